"""What is said of a source before anything is written."""

from data_prep.look import describe_source, source_as_json
from data_prep.sources import list_images
from tests.data_prep import forms


def test_everything_that_was_understood_is_said(tmp_path):
    members = {
        "0.jpg": forms.picture(0),
        "0.cls": b"7",
        "1.png": forms.picture(1, form="PNG"),
        "1.cls": b"",
        "1.txt": b"a caption",
        "lost.cls": b"1",
    }
    path = forms.write_tar(tmp_path / "im-train.tar", members)
    listing = list_images(str(path))
    lines = describe_source(listing, "im-train.tar")
    assert lines == [
        "im-train.tar: 1 x tar",
        f"images: 2 (1 .jpg, 1 .png), {listing.size_N.sum() / 1e6:.1f} MB",
        "classes: 1 numbers, 7 to 7, from the labels of the samples",
        "split: train, by the name of the source",
        "label files seen and not used: 1 x 1.txt, 1 x lost.cls",
        "note: 1 label files cannot be read, and their images have no label: "
        f"1.cls in {path} is empty; it should hold the label.",
        "balance: 6 files seen = 2 images + 2 label and side files + 2 left out",
        "  left out: 1 x ends in .txt, so no image by its name, e.g. 1.txt",
        "  left out: 1 x label or side file without an image, e.g. lost.cls",
    ]
    tree = source_as_json(listing, "im-train.tar")
    assert tree["labels"] == {
        "from": "the labels of the samples",
        "different": 1,
        "lowest": -1,
        "highest": 7,
        "images_without": 1,
    }
    assert tree["split"] == "train" and tree["balance"]["seen"] == 6


def test_classes_are_named_with_their_numbers(tmp_path):
    tree = forms.write_tree(tmp_path / "t", forms.imagenet(2))
    lines = describe_source(list_images(str(tree)), "t")
    assert "classes: 3, 0 = n01440764 ... 2 = n02102040, from folder 1 of the path" in lines
    flat = forms.write_tree(tmp_path / "f", {"1.jpg": forms.picture(1)})
    assert "classes: none; the images have no labels" in describe_source(
        list_images(str(flat)), "f"
    )
