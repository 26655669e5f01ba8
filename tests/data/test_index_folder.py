"""The index of a set in a store comes to this machine once, is checked, and found again."""

import os
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mocov3_ds.data import index_folder, storage
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.manifest import Manifest
from tests import object_store
from tests.data.sets import make_set


@pytest.fixture
def store(s3_server):
    with object_store.environment(s3_server.url):
        yield f"s3://bucket/{os.urandom(4).hex()}"


def names(folder):
    return sorted(path.suffix or path.name for path in folder.iterdir())


def test_an_index_is_fetched_once_and_found_again(store, tmp_path, reads):
    local = make_set(str(tmp_path / "set"), [3, 4])
    made = make_set(store, [3, 4])
    reads.clear()
    first = manifests.load(store, parent=tmp_path / "here")
    folder = tmp_path / "here" / f"mocov3-index-{os.getuid()}"
    assert names(folder) == [".facts", ".index", ".manifest", index_folder.MARK]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert first.digest == made.digest == local.digest and first.has_labels
    np.testing.assert_array_equal(first.index_N, local.index_N)
    assert [url for url in reads if url.endswith("index.bin")] == [f"{store}/index.bin"]
    reads.clear()
    again = manifests.load(store, parent=tmp_path / "here")
    assert again.files == first.files and again.digest == first.digest
    assert reads == [f"{store}/manifest.json", str(first.files.manifest_path)]
    reads.clear()
    manifests.load(store, parent=tmp_path / "here", checked=first.files)
    assert reads == [str(first.files.manifest_path)], "another rank asks the store for nothing"


def test_a_damaged_copy_is_fetched_again(store, tmp_path):
    make_set(store, [3, 4])
    first = manifests.load(store, parent=tmp_path)
    rows, path = first.index_N.tobytes(), first.files.index_path
    for damaged in (rows[:-1] + b"\1", rows[:-32], b""):
        path.unlink()  # whoever has it mapped goes on with the old file
        path.write_bytes(damaged)
        assert manifests.load(store, parent=tmp_path).index_N.tobytes() == rows
    first.files.manifest_path.with_suffix(".facts").write_text("{}")
    assert manifests.load(store, parent=tmp_path).digest == first.digest


def test_a_wrong_index_in_the_store_leaves_nothing(store, tmp_path):
    made = make_set(store, [3, 4])
    storage.write(f"{store}/index.bin", made.index_N.tobytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"index\.bin is not the one that was written with it"):
        manifests.load(store, parent=tmp_path)
    assert names(index_folder.own_folder(tmp_path)) == [".manifest", index_folder.MARK]


def test_another_set_at_the_same_address_is_another_set(store, tmp_path):
    first, _ = make_set(store, [3, 4]), manifests.load(store, parent=tmp_path)
    make_set(store, [2, 4])
    assert manifests.load(store, parent=tmp_path).digest != first.digest


def test_a_folder_that_is_not_ours_is_not_touched(store, tmp_path):
    make_set(store, [3])
    place = tmp_path / f"mocov3-index-{os.getuid()}"
    place.mkdir()
    (place / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"did not make.*") as caught:
        manifests.load(store, parent=tmp_path)
    assert "--data.cache" in str(caught.value) and repr(str(place)) in str(caught.value)
    assert [path.name for path in place.iterdir()] == ["letter.txt"]
    place.rename(tmp_path / "moved")
    (tmp_path / "target").mkdir()
    place.symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="did not make"):
        index_folder.own_folder(tmp_path)
    assert not [*(tmp_path / "target").iterdir()]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be used .File exists"):
        index_folder.own_folder(tmp_path / "file")


def test_no_room_is_said(store, tmp_path, monkeypatch):
    make_set(store, [3])
    monkeypatch.setattr(index_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"^the index .* place.*0\.00 GB are free"):
        manifests.load(store, parent=tmp_path)


def test_what_no_run_has_opened_for_long_is_removed(store, tmp_path):
    for name, sizes in (("a", [3]), ("b", [4])):
        make_set(f"{store}/{name}", sizes)
        manifests.load(f"{store}/{name}", parent=tmp_path)
    folder = index_folder.own_folder(tmp_path)
    old = manifests.load(f"{store}/a", parent=tmp_path).files
    long_ago = time.time() - 2 * index_folder.UNUSED_S
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    make_set(f"{store}/c", [5])
    kept = manifests.load(f"{store}/b", parent=tmp_path).files  # in use now
    manifests.load(f"{store}/c", parent=tmp_path)
    left = {path.name for path in folder.iterdir()}
    assert kept.index_path.name in left and kept.manifest_path.name in left
    assert old.index_path.name not in left and old.manifest_path.name not in left
    assert index_folder.MARK in left and len(left) == 7


def test_a_manifest_travels_without_its_rows(tmp_path):
    made = make_set(str(tmp_path / "set"), [3, 4])
    few = made.first_samples(5)
    for manifest in (made, few):
        text = pickle.dumps(manifest)
        copy: Manifest = pickle.loads(text)
        np.testing.assert_array_equal(copy.index_N, manifest.index_N)
        assert copy.digest == manifest.digest
        assert manifest.index_N.tobytes()[:64] not in text
    assert few.digest != made.digest
