"""Blocks on the local disk: bounded, healed by content, never a reason to end a run."""

import os
import shutil

import numpy as np
import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.cache import FOLDER_NAME, Cache


def test_the_cache_stays_within_its_bound(s3, tmp_path):
    cache = Cache(tmp_path / "cache", 64_000, block=1000)
    storage.write(f"{s3}/long", data := np.random.default_rng(0).bytes(150_500))
    for _ in range(2):
        with cache.open_read(f"{s3}/long", 0, "ab" * 32, len(data)) as file:
            assert file.read() == data
        held = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*-*") if f.is_file())
        assert 40_000 < held <= 64_000
    cache.forget_range("ab" * 32, 150_400, 150_500)
    assert not (tmp_path / "cache" / FOLDER_NAME / "ab" / f"{'ab' * 32}-150").exists()


def test_the_cache_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"too small to be of use; give 0\.27 GB at least"):
        Cache(tmp_path, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        Cache(tmp_path / "file", 1 << 30)


def test_a_full_disk_costs_speed_not_the_run(s3, tmp_path, caplog):
    cache = Cache(tmp_path / "cache", 1 << 30)
    storage.write(f"{s3}/x", b"12345")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder was")
    with cache.open_read(f"{s3}/x", 0, "0" * 64, 5) as file:
        assert file.read() == b"12345"
    assert "going on without" in caplog.text


def test_a_block_of_the_wrong_length_is_fetched_again(s3, tmp_path):
    """As a power cut may leave it."""
    cache = Cache(tmp_path / "cache", 64_000, block=1000)
    storage.write(f"{s3}/two", data := bytes(range(250)) * 6)
    counters.take_counts()
    for expected in ("cache_misses", "cache_hits", "cache_misses"):
        with cache.open_read(f"{s3}/two", 0, "cd" * 32, len(data)) as file:
            assert file.read() == data
        assert counters.take_counts()[expected] >= 1
        if expected == "cache_hits":
            (tmp_path / "cache" / FOLDER_NAME / "cd" / f"{'cd' * 32}-1").write_bytes(b"short")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_foreign_files_are_neither_counted_nor_deleted(s3, tmp_path):
    """Old and large ones, in the folder that was named and in the marked one below it."""
    folder = tmp_path / "scratch"
    ours = folder / FOLDER_NAME
    block = "ab" * 32
    foreign = [
        folder / "photos" / "2019.raw", folder / "ab" / ("cd" * 32), folder / "thesis.tmp",
        ours / "ab" / "photo.raw", ours / "ab" / f"{block}-x", ours / "photos" / f"{block}-1",
        ours / "ab" / "thesis.tmp", ours / "abc" / f"{block}-7", ours / "ab" / f"{block}-9.old",
    ]  # fmt: skip
    cache = Cache(folder, 64_000, block=1000)
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(50_000))
        os.utime(path, (1, 1))
    (ours / "ef").symlink_to(folder / "photos")
    half = ours / "ab" / f"{block}-3.77-0123abcd.tmp"
    half.write_bytes(bytes(50_000))
    os.utime(half, (1, 1))
    storage.write(f"{s3}/long", data := np.random.default_rng(0).bytes(150_500))
    with cache.open_read(f"{s3}/long", 0, block, len(data)) as file:
        assert file.read() == data
    assert all(path.stat().st_size == 50_000 for path in foreign)
    assert not half.exists()  # of a writer that was killed, and ours
    kept = sum(p.stat().st_size for p in (ours / "ab").glob(f"{block}-*") if p not in foreign)
    assert 40_000 < kept <= 64_000


def test_a_folder_of_that_name_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "a" / FOLDER_NAME).mkdir(parents=True)
    (tmp_path / "a" / FOLDER_NAME / "thesis.tex").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FOLDER_NAME).symlink_to(tmp_path / "a")
    for name in "ab":
        with pytest.raises(ValueError, match="is no cache of this program"):
            Cache(tmp_path / name, 1 << 30)
    Cache(tmp_path / "c", 1 << 30)
    Cache(tmp_path / "c", 1 << 30)  # its own
    assert (tmp_path / "c" / FOLDER_NAME / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a")


def test_blocks_of_an_earlier_version_are_told_and_stay(tmp_path, caplog):
    old = tmp_path / "ab" / f"{'ab' * 32}-0"
    old.parent.mkdir()
    old.write_bytes(b"x")
    Cache(tmp_path, 1 << 30)
    assert "blocks of an earlier version" in caplog.text and old.exists()


def test_a_link_in_the_place_of_a_block_is_not_read(s3, tmp_path):
    cache = Cache(tmp_path / "cache", 64_000, block=1000)
    storage.write(f"{s3}/one", b"right")
    (tmp_path / "secret").write_bytes(b"wrong")
    path = tmp_path / "cache" / FOLDER_NAME / "cd" / f"{'cd' * 32}-0"
    path.parent.mkdir()
    path.symlink_to(tmp_path / "secret")
    with cache.open_read(f"{s3}/one", 0, "cd" * 32, 5) as file:
        assert file.read() == b"right"
    assert (tmp_path / "secret").read_bytes() == b"wrong" and not path.is_symlink()


def test_nothing_is_written_behind_a_link(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "theirs").mkdir()
    cache = Cache(tmp_path / "cache", 64_000, block=1000)
    (tmp_path / "cache" / FOLDER_NAME / "ef").symlink_to(tmp_path / "theirs")
    assert cache.read_block(str(tmp_path / "file"), "ef" * 32, 0, 5, None) == b"12345"
    assert not [*(tmp_path / "theirs").iterdir()] and "ef is a link" in caplog.text
