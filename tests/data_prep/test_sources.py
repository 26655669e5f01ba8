"""Every form of the same images gives the same list; odd sources are refused in one sentence."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources import key_of, open_source, read_names
from tests.data_prep import forms

IMAGES = forms.imagenet(4)


def described(listing):
    """All that the shards depend on, with the bytes read where the list says they lie."""
    rows = []
    for item in listing.items(np.arange(len(listing))):
        with Path(item.path).open("rb") as file:
            file.seek(item.offset)
            rows.append((item.name, item.key, item.label, file.read(item.size)))
    return rows, listing.classes, listing.digest()


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", IMAGES)


def test_a_tree_is_listed_like_image_folder(tree):
    (tree / "n01440764" / "notes.txt").write_text("x")
    (tree / "n01440764" / ".hidden.jpg").write_bytes(b"x")
    (tree / "n99999999").mkdir()  # an empty class folder is no class
    listing = open_source(str(tree))
    rows, classes, _ = described(listing)
    assert classes == forms.CLASSES
    assert rows == [
        (name, name.partition("/")[2].partition(".")[0], forms.CLASSES.index(name[:9]), data)
        for name, data in sorted(IMAGES.items())
    ]
    assert listing.left_out == ["n01440764/notes.txt"]


def test_a_tree_a_tar_and_a_nested_tar_are_the_same_source(tree, tmp_path):
    wanted = described(open_source(str(tree)))
    flat = forms.write_tar(tmp_path / "flat.tar", dict(reversed(IMAGES.items())))
    assert described(open_source(str(flat))) == wanted
    nested = forms.write_tar(tmp_path / "ILSVRC2012_img_train.tar", forms.nested(IMAGES))
    assert described(open_source(str(nested))) == wanted
    below = {f"train/{name}": data for name, data in IMAGES.items()}
    below |= {f"val/{name}": data for name, data in forms.imagenet(2).items()}
    splits = forms.write_tar(tmp_path / "splits.tar", below)
    assert described(open_source(str(splits), under="train")) == wanted
    forms.write_tree(tmp_path / "splits", below)
    assert described(open_source(str(tmp_path / "splits"), under="train/")) == wanted


def test_linked_folders_are_followed_once(tree, tmp_path):
    other = tmp_path / "linked"
    other.mkdir()
    for name in forms.CLASSES:
        (other / name).symlink_to(tree / name)
    (other / "again").symlink_to(other)
    assert described(open_source(str(other)))[0] == described(open_source(str(tree)))[0]


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
    listing = open_source(str(tmp_path / "s"))
    rows, classes, _ = described(listing)
    assert rows == [
        ("0/a.jpg", "0_a", 7, forms.picture(1)),
        ("0/b.PNG", "0_b", -1, forms.picture(2)),
        ("1/c.jpeg", "1_c", 3, forms.picture(3)),
        ("2/d.jpg", "2_d", 5, forms.picture(4)),
    ]
    assert classes == ()
    items = listing.items(np.arange(4))
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
    rows, _, _ = described(open_source(str(forms.write_tar(tmp_path / "t.tar", members))))
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
    listing = open_source(str(forms.write_tar(tmp_path / "t.tar", members)))
    assert listing.classes == ("cat", "dog") and listing.label_N.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("cat/1.5.png", "cat_1_5"),
        ("cat/catalogue.jpg", "cat_catalogue"),
        ("a/b/c.jpg", "a_b_c"),
        ("x.jpg", "x"),
        ("straße/ü ö.jpg", "stra_e_" + "_"),
    ],
)
def test_keys_are_safe_and_say_where_an_image_is_from(name, key):
    assert key_of(name) == key


def test_keys_never_collide(tmp_path):
    names = [
        "a/1.jpg",
        "a/1.png",
        "a/1_.jpg",
        "a/1 .jpg",
        "a_1.jpg",
        "b/a-2.jpg",
        "b/" + "x" * 200 + ".jpg",
    ]
    names += ["c/ü.jpg", "c/ö.jpg", "c/_.jpg", "c/_-2.jpg"]
    tree = forms.write_tree(
        tmp_path, {f"k/{name}": forms.picture(n) for n, name in enumerate(names)}
    )
    keys = open_source(str(tree)).keys
    assert len({*keys}) == len(names) and max(map(len, keys)) <= 93
    assert "." not in "".join(keys)


def val(tmp_path, count=6):
    """A validation archive: images without folders, and the class each is of."""
    images = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": forms.picture(n) for n in range(count)}
    wanted = [forms.CLASSES[n * 7 % 3] for n in range(count)]
    return str(forms.write_tar(tmp_path / "ILSVRC2012_img_val.tar", images)), wanted


def labels_in_order(listing):
    return [listing.classes[label] for label in listing.label_N]


def test_validation_labels_in_every_form_of_the_file(tmp_path):
    source, wanted = val(tmp_path)
    names = [f"ILSVRC2012_val_{n + 1:08d}" for n in range(6)]
    file = tmp_path / "labels.txt"
    lists = {
        "a synset a line": "\n".join(wanted),
        "image and synset": "\n".join(
            f"{name}.JPEG {w}" for name, w in reversed([*zip(names, wanted, strict=True)])
        ),
        "Kaggle": "ImageId,PredictionString\n"
        + "\n".join(f"{name},{w} 1 2 3 4" for name, w in zip(names, wanted, strict=True)),
    }
    for what, text in lists.items():
        file.write_text(text + "\n")
        listing = open_source(source, labels=file)
        assert labels_in_order(listing) == wanted, what
        assert listing.classes == tuple(sorted({*wanted}))


def test_the_kits_own_numbers_are_translated_by_name(tmp_path):
    source, wanted = val(tmp_path)
    kit_order = ["n02102040", "n01440764", "n01443537"]
    (tmp_path / "truth.txt").write_text("".join(f"{kit_order.index(w) + 1}\n" for w in wanted))
    (tmp_path / "kit.txt").write_text("".join(f"{name} words\n" for name in kit_order))
    listing = open_source(source, labels=tmp_path / "truth.txt", classes=tmp_path / "kit.txt")
    assert labels_in_order(listing) == wanted
    assert listing.classes == forms.CLASSES, "numbered as the training set is: by sorted name"
    with pytest.raises(ValueError, match=r"order of its own.*add --classes"):
        open_source(source, labels=tmp_path / "truth.txt")
    (tmp_path / "truth.txt").write_text("4\n" * 6)
    with pytest.raises(ValueError, match="holds class 4, the class file has 3 names"):
        open_source(source, labels=tmp_path / "truth.txt", classes=tmp_path / "kit.txt")


def test_numbers_beside_image_names_are_taken_as_they_are(tmp_path):
    source, wanted = val(tmp_path)
    lines = [
        f"ILSVRC2012_val_{n + 1:08d}.JPEG {forms.CLASSES.index(w)}" for n, w in enumerate(wanted)
    ]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    listing = open_source(source, labels=tmp_path / "val.txt")
    assert listing.label_N.tolist() == [forms.CLASSES.index(w) for w in wanted]
    (tmp_path / "names.txt").write_text("\n".join(forms.CLASSES))
    named = open_source(source, labels=tmp_path / "val.txt", classes=tmp_path / "names.txt")
    assert labels_in_order(named) == wanted


def test_a_class_file_numbers_a_tree(tree, tmp_path):
    (tmp_path / "order.txt").write_text("n02102040\nn01440764 tench\nn01443537\nn00000000\n")
    listing = open_source(str(tree), classes=tmp_path / "order.txt")
    assert listing.classes == ("n02102040", "n01440764", "n01443537", "n00000000")
    assert sorted({*listing.label_N.tolist()}) == [0, 1, 2]
    assert listing.label_N[0] == 1  # n01440764


def test_bad_sources_are_told_in_one_sentence(tree, tmp_path):
    def refused(source, match, **options):
        with pytest.raises(ValueError, match=match) as error:
            open_source(str(source), **options)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "there is no .*nowhere")
    refused("s3://bucket/images", "sources are files of this machine")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    refused(tree, "there is no folder val in", under="val")
    flat = forms.write_tar(tmp_path / "flat.tar", IMAGES)
    refused(flat, r"\(below val\) holds no images", under="val")
    (tree / "stray.jpg").write_bytes(forms.picture(0))
    refused(tree, "1 of 13 images of .* have no class, e.g. stray.jpg; put every image in a class")
    splits = {
        f"{split}/{name}": data for split in ("train", "val") for name, data in IMAGES.items()
    }
    refused(
        forms.write_tree(tmp_path / "splits", splits),
        r"holds splits \(train, val\), not classes; .*--under train --split train",
    )
    dangling = forms.write_tree(tmp_path / "dangling", {"a/x.jpg": b"1"})
    (dangling / "a" / "y.jpg").symlink_to("nothing")
    refused(dangling, "y.jpg is a link to nothing")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(flat.read_bytes()[:1536])
    refused(cut, "cut.tar is cut short at byte 1536")
    hostile = forms.write_tar(tmp_path / "hostile.tar", {"../x.jpg": b"1"})
    refused(hostile, "leaves the archive's own folder")
    inner = forms.nested(IMAGES)
    inner["n01443537.tar"] = inner["n01443537.tar"][:3000]
    damaged = forms.write_tar(tmp_path / "inner.tar", inner)
    refused(damaged, "n01443537.tar in .*inner.tar.* (cut short|past the end)")
    text = tmp_path / "text.tar"
    text.write_text("hello" * 200)
    refused(text, "no tar header|checksum")


def test_bad_label_and_class_files_are_told_in_one_sentence(tree, tmp_path):
    source, _ = val(tmp_path)
    file = tmp_path / "labels.txt"

    def refused(text, match, source=source, **options):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=match):
            open_source(source, **(options or {"labels": file}))

    refused(b"\n", "labels.txt is empty")
    refused(b"\xff\xfe\n", "is not a text file")
    refused(b"cat\ndog\n", "has 2 lines for 6 images")
    refused(
        b"ILSVRC2012_val_00000001.JPEG 3\n", "no label for 5 of 6 images, e.g. ILSVRC2012_val_0"
    )
    refused(b"a\nb\na\n", "names class a twice", str(tree), classes=file)
    refused(
        b"n01440764\n", "holds 2 classes that the class file does not name", str(tree), classes=file
    )
    with pytest.raises(ValueError, match=r"there is no .*nothing.txt"):
        read_names(tmp_path / "nothing.txt")
    for members, match in (
        ({"a.jpg": forms.picture(0), "a.cls": b"x" * 2000}, "a.cls .* has 2000 bytes"),
        ({"a.jpg": forms.picture(0), "a.cls": b" "}, "a.cls .* is empty"),
        ({"a.jpg": forms.picture(0), "a.json": b"{"}, "a.json .* is not valid JSON"),
    ):
        with pytest.raises(ValueError, match=match):
            open_source(str(forms.write_tar(tmp_path / "w.tar", members)))


def test_long_names_of_pax_and_gnu_tars_are_read(tmp_path):
    name = "class_" + "x" * 120 + "/" + "y" * 150 + ".jpg"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = forms.write_tar(tmp_path / "long.tar", {name: forms.picture(0)}, form)
        listing = open_source(str(tar))
        assert listing.names == [name] and listing.classes == (name.partition("/")[0],)
