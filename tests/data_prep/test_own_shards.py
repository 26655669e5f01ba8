"""Images straight into a run: any folder of them, sharded once, found again, never guessed at."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import own_shards
from data_prep.own_shards import ensure_shards
from mocov3_ds.data import manifest as manifests
from tests.data.sets import picture
from tests.data_prep.forms import write_tar


def put_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return str(folder)


@pytest.mark.parametrize(
    "names, labels, classes",
    [
        (["c.jpg", "a.jpg", "b.jpg"], [-1, -1, -1], ()),
        (["x/a.jpg", "y/b.jpg", "y/c.jpg"], [0, 1, 1], ("x", "y")),
        (["x/p/a.jpg", "x/q/b.jpg", "y/r/c.jpg"], [0, 0, 1], ("x", "y")),
        (["x/p/a.jpg", "x/q/b.jpg", "y/p/c.jpg", "y/q/d.jpg"], [-1] * 4, ()),  # x or p?
        (["a.jpg", "y/b.jpg", "y/c.jpg"], [-1, 0, 0], ("y",)),
    ],
)
def test_any_folder_is_sharded_whole(tmp_path, capsys, names, labels, classes):
    source = put_images(tmp_path / "photos", names)
    url = ensure_shards(source, tmp_path / "own")
    made = manifests.load(url)
    assert sorted(made.index_N["label"].tolist()) == sorted(labels) and made.classes == classes
    sizes = sorted(len(picture(number)) for number in range(len(names)))
    np.testing.assert_array_equal(np.sort(made.index_N["size"]), sizes)
    said = capsys.readouterr().out
    assert f"images: {len(names)}" in said and url in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "photos"]


def test_the_second_time_nothing_is_made(tmp_path, capsys, monkeypatch):
    source = put_images(tmp_path / "photos", ["a.jpg"])
    url = ensure_shards(source, tmp_path / "own")
    monkeypatch.setattr(own_shards, "make_shards", None)
    assert ensure_shards(source + "/", tmp_path / "own") == url
    assert "sharded before" in capsys.readouterr().out
    other = put_images(tmp_path / "more" / "photos", ["a.jpg"])
    monkeypatch.undo()
    assert ensure_shards(other, tmp_path / "own") != url


def test_what_was_not_finished_goes_on(tmp_path):
    source = put_images(tmp_path / "photos", ["a.jpg", "b.jpg"])
    url = ensure_shards(source, tmp_path / "own")
    before = manifests.load(url).digest
    Path(url, manifests.NAME).unlink()
    assert manifests.load(ensure_shards(source, tmp_path / "own")).digest == before


def test_two_readings_are_refused_with_a_way_out(tmp_path):
    source = put_images(tmp_path / "photos", ["train/x/a.jpg", "val/x/b.jpg"])
    with pytest.raises(ValueError, match=r"splits.*These are flags of .*--data\.shards takes"):
        ensure_shards(source, tmp_path / "own")
    for name in ("a", "b"):
        members = {f"set/{split}/x/{name}.jpg": picture(0) for split in ("train", "val")}
        write_tar(tmp_path / "tars" / f"{name}.tar", members)
    with pytest.raises(ValueError, match=r"splits \(train, val\).*These are flags of"):
        ensure_shards(str(tmp_path / "tars"), tmp_path / "own")
    with pytest.raises(ValueError, match="no "):
        ensure_shards(str(tmp_path / "absent"), tmp_path / "own")
    assert not (tmp_path / "own").exists()
