"""Images, labels and samples in the members of tars."""

import json
import tarfile
from pathlib import Path

import numpy as np

from data_prep.sources import list_images
from data_prep.tar import Member
from data_prep.tar_listing import FileWindow, group_samples
from tests.data_prep import forms
from tests.data_prep.making import describe_listing


def test_webdataset_tars_keep_labels_and_json(tmp_path):
    shards = [
        {
            "a.jpg": forms.picture(1),
            "a.cls": b"7",
            "a.json": b'{"x": 1}',
            "b.PNG": forms.picture(2),
        },
        {"c.json": b'{"label": 3}', "c.mask.png": forms.picture(9), "c.jpeg": forms.picture(3)},
        {"d.jpg": forms.picture(4), "d.cls": b" 5\n", "e.txt": b"no image", "e.cls": b"1"},
    ]
    for number, members in enumerate(shards):
        forms.write_tar(tmp_path / "s" / f"{number}.tar", members)
    listing = list_images(str(tmp_path / "s"))
    rows, classes, _ = describe_listing(listing)
    assert rows == [
        ("0/a.jpg", "0_a", 7, forms.picture(1)),
        ("0/b.PNG", "0_b", -1, forms.picture(2)),
        ("1/c.jpeg", "1_c", 3, forms.picture(3)),
        ("2/d.jpg", "2_d", 5, forms.picture(4)),
    ]
    assert classes == ()
    items = listing.select_items(np.arange(4))
    with Path(items[0].path).open("rb") as file:
        file.seek(items[0].json_offset)
        assert json.loads(file.read(items[0].json_size)) == {"x": 1}
    assert [item.json_size for item in items] == [8, 0, 12, 0]


def test_names_with_dots_of_their_own_lose_no_image(tmp_path):
    members = {
        "img.0001.jpg": forms.picture(1),
        "img.0001.cls": b"4",
        "img.0002.jpg": forms.picture(2),
        "img.0002.cls": b"5",
        "pair.left.png": forms.picture(3),
        "pair.cls": b"6",
    }
    rows, _, _ = describe_listing(list_images(str(forms.write_tar(tmp_path / "t.tar", members))))
    assert [(name, label) for name, _, label, _ in rows] == [
        ("img.0001.jpg", 4),
        ("img.0002.jpg", 5),
        ("pair.left.png", 6),
    ]


def test_class_names_in_cls_files_are_numbered(tmp_path):
    members = {
        "a.jpg": forms.picture(1),
        "a.cls": b"dog",
        "b.jpg": forms.picture(2),
        "b.cls": b"cat",
    }
    listing = list_images(str(forms.write_tar(tmp_path / "t.tar", members)))
    assert listing.classes == ("cat", "dog") and listing.label_N.tolist() == [1, 0]


def test_long_names_of_pax_and_gnu_tars_are_read(tmp_path):
    name = "class_" + "x" * 120 + "/" + "y" * 150 + ".jpg"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = forms.write_tar(tmp_path / "long.tar", {name: forms.picture(0)}, form)
        listing = list_images(str(tar))
        assert listing.names == [name] and listing.classes == (name.partition("/")[0],)


def test_samples_are_runs_of_members_with_one_key():
    names = ["a.jpg", "a.cls", "b.cls", "a.png", "c.mask.png", "c.png", ".hidden", "x.txt"]
    samples = list(group_samples([Member(name, n, 1) for n, name in enumerate(names)]))
    assert [(sample.key, sample.image.name) for sample in samples] == [
        ("a", "a.jpg"),
        ("a", "a.png"),
        ("c", "c.png"),
    ]
    assert samples[0].cls.name == "a.cls" and samples[1].cls is None


def test_a_window_ends_where_it_ends(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with (tmp_path / "x").open("rb") as file:
        window = FileWindow(file.fileno(), 10, 20)
        assert window.read(4) == bytes(range(10, 14)) and window.read(100) == bytes(range(14, 20))
        window.seek(1)
        assert window.read(2) == bytes([11, 12])
        assert window.read_member(Member("m", 5, 3)) == bytes([15, 16, 17])
