"""Images, labels and samples in the members of tars."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from data_prep.listing import UnsortedImages
from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from data_prep.tar import Member
from data_prep.tar_listing import FileWindow, list_tar
from mocov3_ds.data.views import decode
from tests.data_prep import forms
from tests.data_prep.making import describe_listing, make


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
    listing = list_images(str(tmp_path / "s"), unlabelled="keep")
    rows, classes, _ = describe_listing(listing)
    assert rows == [
        ("0/a.jpg", "0_a", 7, forms.picture(1)),
        ("0/b.PNG", "0_b", -1, forms.picture(2)),
        ("1/c.jpeg", "1_c", 3, forms.picture(3)),
        ("2/d.jpg", "2_d", 5, forms.picture(4)),
    ]
    assert classes == ()
    assert listing.balance.as_json(0) == {
        "seen": 11,
        "kept": 4,
        "rejected": 0,
        "side_files": 4,
        "left_out": {
            "ends in .txt, so no image by its name": 1,
            "further image of a sample": 1,
            "label or side file without an image": 1,
        },
    }
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


def test_a_window_ends_where_it_ends(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with (tmp_path / "x").open("rb") as file:
        window = FileWindow(file.fileno(), 10, 20)
        assert window.read(4) == bytes(range(10, 14)) and window.read(100) == bytes(range(14, 20))
        window.seek(1)
        assert window.read(2) == bytes([11, 12])
        assert window.read_member(Member("m", 5, 3)) == bytes([15, 16, 17])


def test_a_bad_label_file_costs_the_label_and_not_the_image(tmp_path):
    members = {
        "a.jpg": forms.picture(1),
        "a.json": b"{",
        "b.jpg": forms.picture(2),
        "b.json": b'{"label": 3}',
        "c.jpg": forms.picture(3),
        "c.json": b" " * (2 << 20),
    }
    listing = list_images(str(forms.write_tar(tmp_path / "t.tar", members)))
    assert listing.label_N.tolist() == [-1, 3, -1]
    assert any("2 label files cannot be read" in n and "a.json in" in n for n in listing.notes)
    names = {"a.jpg": forms.picture(1), "a.cls": b"dog", "b.jpg": forms.picture(2), "b.cls": b""}
    listing = list_images(str(forms.write_tar(tmp_path / "n.tar", names)))
    assert listing.classes == ("dog",) and listing.label_N.tolist() == [0, -1]
    nested = {"a.jpg": forms.picture(1), "a.json": b"[" * 100_000}
    tar = str(forms.write_tar(tmp_path / "r.tar", nested))
    with pytest.raises(
        ValueError, match=r"none of the 1 label files .*a.json in .*--label - takes"
    ):
        list_images(tar)
    assert list_images(tar, label="-").label_N.tolist() == [-1]


def test_samples_without_labels_in_folders_are_asked_about(tmp_path):
    members = {}
    for name in ("cat/0", "dog/1"):
        members |= {f"{name}.jpg": forms.picture(len(members)), f"{name}.json": b'{"w": 1}'}
    tar = str(forms.write_tar(tmp_path / "t.tar", members))
    with pytest.raises(ValueError, match=r"no label, in 2 folders \(cat, dog\): --class-level 1"):
        list_images(tar)
    assert list_images(tar, options=SourceOptions(class_level="1")).classes == ("cat", "dog")
    assert list_images(tar, options=SourceOptions(class_level="none")).classes == ()


def test_labelled_samples_beside_class_folders_are_refused(tmp_path):
    samples = {"a.jpg": forms.picture(1), "a.cls": b"1"}
    forms.write_tar(tmp_path / "s" / "0.tar", samples)
    forms.write_tar(tmp_path / "s" / "1.tar", {"cat/b.jpg": forms.picture(2)})
    with pytest.raises(ValueError, match=r"some archives of .* labelled samples and some folders"):
        list_images(str(tmp_path / "s"))


def test_a_stream_is_listed_like_the_file(tmp_path):
    members = forms.nested(forms.imagenet(2)) | {"a.json": b"{}"}
    inner = {"0.jpg": forms.picture(1), "0.cls": b"4", "0.json": b'{"x": 1}'}
    for content in (members, {"s.tar": forms.tar_bytes(inner)}, inner):
        path = forms.write_tar(tmp_path / "t.tar", content)
        listed, streamed = UnsortedImages(), UnsortedImages()
        list_tar(listed, path, 0)
        with path.open("rb") as file:
            list_tar(streamed, path, 0, stream=OnlyForward(file))
        assert streamed == listed and listed.names


class OnlyForward:
    """A stream that cannot go back, as a compressed file is read."""

    def __init__(self, file):
        self.read = file.read
        self._file = file

    def seek(self, position):
        assert position >= self._file.tell()
        self._file.seek(position)


def test_every_format_that_pillow_reads_here_is_an_image(tmp_path):
    members = {}
    forms_of = {"jfif": "JPEG", "jpe": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
    if features.check("avif"):
        forms_of["avif"] = "AVIF"
    if "HEIF" in decode.FORMATS:
        forms_of["heic"] = forms_of["heif"] = "HEIF"
    for number, (ending, form) in enumerate(forms_of.items()):
        members |= {f"{number}.{ending}": forms.picture(number, form=form)}
        members |= {f"{number}.cls": b"%d" % number}
    members |= {"x.jxl": b"x", "x.cls": b"9"}
    tar = forms.write_tar(tmp_path / "t.tar", members)
    made = make(tar, tmp_path / "out")
    assert sorted(made.manifest.index_N["label"]) == [*range(len(forms_of))]
    (reject,) = made.rejects
    assert reject.reason == "image format that is not read (.jxl)"
