"""Shards of given images have one place, whatever way the folder is named."""

from pathlib import Path

from mocov3_ds.data.own_space import folder_of_images


def test_one_place_for_each_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {
        folder_of_images(name, Path("runs")) for name in ("a/b", "a/b/", str(tmp_path / "a/b"))
    }
    (place,) = places
    assert place.parent == Path("runs/sharded-images") and place.name.startswith("b-")
    assert folder_of_images("c/b", Path("runs")) != place
