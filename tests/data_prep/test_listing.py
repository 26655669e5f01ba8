"""Keys of images: safe, telling, unique; and the columns of a listing."""

import os

import numpy as np
import pytest

from data_prep.balance import Omission
from data_prep.class_numbers import ClassNames
from data_prep.listing import UnsortedImages, identify_file, image_key
from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from tests.data_prep import forms


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
    assert image_key(name) == key


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
    keys = list_images(str(tree), options=SourceOptions(class_level="1")).keys
    assert len({*keys}) == len(names) and max(map(len, keys)) <= 93
    assert "." not in "".join(keys)


def test_images_are_sorted_and_numbered_by_name():
    images = UnsortedImages()
    images.add_image("b/2.jpg", -1, 0, 20, "b")
    images.add_image("a/1.jpg", 0, 512, 10, "a", (1024, 3))
    for name in ("z.txt", "a.txt"):
        images.balance.leave_out(name, "no image")
    listing = images.to_listing(["x.tar"], "/root", ClassNames(), "source")
    assert listing.names == ["a/1.jpg", "b/2.jpg"] and listing.classes == ("a", "b")
    first, second = listing.select_items(np.array([0, 1]))
    assert first == ("a/1.jpg", "a_1", "x.tar", 512, 10, 0, 1024, 3) and first.suffix == "jpg"
    assert second == ("b/2.jpg", "b_2", "/root/b/2.jpg", 0, 20, 1, 0, 0)
    assert listing.balance.left_out == {"no image": Omission(2, "a.txt")}
    images.size[0] += 1
    assert (
        images.to_listing(["x.tar"], "/root", ClassNames(), "source").digest() != listing.digest()
    )


def test_a_folder_is_selected_as_if_it_were_the_root():
    images = UnsortedImages()
    for name, label in (("train/cat/1.jpg", "train"), ("train/2.jpg", 7), ("val/3.jpg", "val")):
        images.add_image(name, 0, 512, 10, label)
    images.folders = {"train", "train/cat", "train/empty", "val"}
    selection = images.select_folder("train")
    assert selection.names == ["cat/1.jpg", "2.jpg"] and selection.label == ["train", 7]
    assert selection.folders == {"cat", "empty", ""} - {""}
    assert selection.balance.images == 2 and selection.balance.omitted == 1


def test_a_folder_of_each_archive_is_selected():
    images = UnsortedImages(prefix={0: "p0/", 1: "p1/"})
    images.bad_rows = {2}
    for number, name in (
        (0, "p0/tr\u00e4in/cat/1.jpg"),
        (0, "p0/val/2.jpg"),
        (1, "p1/tr\u00e4in/3.jpg"),
    ):
        images.add_image(name, number, 512, 10, None)
    selection = images.select_folder("tra\u0308in")
    assert selection.names == ["p0/cat/1.jpg", "p1/3.jpg"] and selection.bad_rows == {1}
    assert [selection.inner_name(row) for row in (0, 1)] == ["cat/1.jpg", "3.jpg"]
    whole = images.select_folder("p0/val")
    assert whole.names == ["2.jpg"] and whole.inner_name(0) == "2.jpg"


def test_a_file_is_known_again_by_its_size_and_time(tmp_path):
    path = tmp_path / "x"
    assert identify_file(str(path)) == (0, 0)
    path.write_bytes(b"123")
    before = identify_file(str(path))
    assert before.size == 3
    os.utime(path, ns=(1, 1))
    assert identify_file(str(path)) == (3, 1) != before
