"""Every form of the same images gives the same list; odd sources are refused in one sentence."""

import pytest

from data_prep.sources import list_images
from tests.data_prep import forms
from tests.data_prep.making import describe_listing

IMAGES = forms.imagenet(4)


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", IMAGES)


def test_a_tree_is_listed_like_image_folder(tree):
    (tree / "n01440764" / "notes.txt").write_text("x")
    (tree / "n01440764" / ".hidden.jpg").write_bytes(b"x")
    (tree / "n99999999").mkdir()  # an empty class folder is no class
    listing = list_images(str(tree))
    rows, classes, _ = describe_listing(listing)
    assert classes == forms.CLASSES
    assert rows == [
        (name, name.partition("/")[2].partition(".")[0], forms.CLASSES.index(name[:9]), data)
        for name, data in sorted(IMAGES.items())
    ]
    assert listing.left_out == ["n01440764/notes.txt"]


def test_a_tree_a_tar_and_a_nested_tar_are_the_same_source(tree, tmp_path):
    wanted = describe_listing(list_images(str(tree)))
    flat = forms.write_tar(tmp_path / "flat.tar", dict(reversed(IMAGES.items())))
    assert describe_listing(list_images(str(flat))) == wanted
    nested = forms.write_tar(tmp_path / "ILSVRC2012_img_train.tar", forms.nested(IMAGES))
    assert describe_listing(list_images(str(nested))) == wanted
    below = {f"train/{name}": data for name, data in IMAGES.items()}
    below |= {f"val/{name}": data for name, data in forms.imagenet(2).items()}
    splits = forms.write_tar(tmp_path / "splits.tar", below)
    assert describe_listing(list_images(str(splits), under="train")) == wanted
    forms.write_tree(tmp_path / "splits", below)
    assert describe_listing(list_images(str(tmp_path / "splits"), under="train/")) == wanted


def test_linked_folders_are_followed_once(tree, tmp_path):
    other = tmp_path / "linked"
    other.mkdir()
    for name in forms.CLASSES:
        (other / name).symlink_to(tree / name)
    (other / "again").symlink_to(other)
    assert (
        describe_listing(list_images(str(other)))[0] == describe_listing(list_images(str(tree)))[0]
    )


def test_bad_sources_are_refused_in_one_sentence(tree, tmp_path):
    def refused(source, match, **options):
        with pytest.raises(ValueError, match=match) as error:
            list_images(str(source), **options)
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


def test_a_file_url_is_a_path(tree):
    assert describe_listing(list_images(f"file://{tree}")) == describe_listing(
        list_images(str(tree))
    )
