"""A folder is walked as ImageFolder walks it, and every entry is counted."""

import pytest

from data_prep import tree_listing
from data_prep.listing import UnsortedImages
from data_prep.tree_listing import list_tree
from tests.data_prep import forms


def walk(root):
    images = UnsortedImages()
    list_tree(images, root)
    assert images.balance.as_json(0)["seen"] >= len(images.names)
    return images


def test_links_lead_to_images_and_loops_do_not(tmp_path):
    tree = forms.write_tree(tmp_path / "t", {"a/1.jpg": b"x", "a/b/2.png": b"yy", "c.txt": b""})
    (tree / "again").symlink_to(tree / "a")
    (tree / "a" / "up").symlink_to(tree)
    images = walk(tree)
    assert sorted(images.names) == ["a/1.jpg", "a/b/2.png", "again/1.jpg", "again/b/2.png"]
    loops = images.balance.left_out["folder that holds itself by a link"]
    assert loops.count == 2 and loops.example == "a/up"
    assert len(images.repeated_folders) == 2 and images.folders == {
        "",
        "a",
        "a/b",
        "again",
        "again/b",
    }
    assert images.other_folders == {""}


def test_links_that_multiply_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_listing, "_MOST_REPEATS", 20)
    for depth in range(8):
        for name in ("x", "y"):
            (tmp_path / f"{depth}").mkdir(exist_ok=True)
            (tmp_path / f"{depth}" / name).symlink_to(tmp_path / f"{depth + 1}")
    (tmp_path / "8").mkdir()
    with pytest.raises(ValueError, match="met before more than 20 times"):
        walk(tmp_path / "0")


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "x.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"x.jpg is a link to nothing"):
        walk(tmp_path)
