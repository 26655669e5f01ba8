"""Shards of given images have one place, whatever way the folder is named."""

from pathlib import Path

from mocov3_ds.data.own_space import folder_of_images, holds_images, shards_of


def test_one_place_for_each_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {
        folder_of_images(name, Path("runs")) for name in ("a/b", "a/b/", str(tmp_path / "a/b"))
    }
    (place,) = places
    assert place.parent == Path("runs/sharded-images") and place.name.startswith("b-")
    assert folder_of_images("c/b", Path("runs")) != place


def test_which_sets_are_folders_of_images(tmp_path):
    for name, file in (("images", "a.jpg"), ("shards", "manifest.json"), ("tars", "a.tar")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    names = ("images", "shards", "tars", "absent")
    assert [holds_images(str(tmp_path / name)) for name in names] == [True, False, False, False]
    assert not holds_images("") and not holds_images("s3://bucket/images")
    images, shards = (str(tmp_path / name) for name in names[:2])
    assert shards_of(images, Path("runs")) == str(folder_of_images(images, Path("runs")))
    assert shards_of(shards, Path("runs")) == shards
