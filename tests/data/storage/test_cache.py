"""Blocks on the local disk: bounded, healed by content, never a reason to end a run."""

import numpy as np
import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.cache import Cache


def test_the_cache_stays_within_its_bound(s3, tmp_path):
    cache = Cache(tmp_path / "cache", 64_000, block=1000)
    storage.write(f"{s3}/long", data := np.random.default_rng(0).bytes(150_500))
    for _ in range(2):
        with cache.open_read(f"{s3}/long", 0, "ab" * 32, len(data)) as file:
            assert file.read() == data
        held = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file())
        assert 40_000 < held <= 64_000
    cache.forget_range("ab" * 32, 150_400, 150_500)
    assert not (tmp_path / "cache" / "ab" / f"{'ab' * 32}-150").exists()


def test_the_cache_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"too small to be of use; give 0\.27 GB at least"):
        Cache(tmp_path, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        Cache(tmp_path / "file", 1 << 30)


def test_a_full_disk_costs_speed_not_the_run(s3, tmp_path, caplog):
    cache = Cache(tmp_path / "cache", 1 << 30)
    storage.write(f"{s3}/x", b"12345")
    (tmp_path / "cache").rmdir()
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
            (tmp_path / "cache" / "cd" / f"{'cd' * 32}-1").write_bytes(b"short")
    assert not list((tmp_path / "cache").rglob("*.tmp"))
