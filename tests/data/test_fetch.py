"""Samples by number: few requests, each sample checked, each nameable."""

import random
import zlib

import numpy as np

from mocov3_ds.data import fetch, storage
from mocov3_ds.data import manifest as manifests
from tests.data.loading import damage
from tests.data.sets import make_set, picture


def test_runs_are_read_together(monkeypatch):
    """Neighbours come by one request, far ones do not drag what lies between along."""
    asked = []
    size = 1000
    count = 3000
    index_N = np.zeros(count, manifests.ROW)
    index_N["offset"] = 512 + 2048 * np.arange(count)
    index_N["size"] = size
    index_N["crc32"] = zlib.crc32(bytes(size))
    shard = manifests.Shard("a.tar", 2048 * (count + 1), count, "0" * 64)
    manifest = manifests.Manifest("x", (shard,), index_N)

    class File:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, at):
            pass

        def read(self, count):
            return bytes(count)

    def open_read(url, start, end, stop):
        asked.append((start, end))
        return File()

    monkeypatch.setattr(storage, "open_read", open_read)
    ids = np.array(random.Random(0).sample([5, 6, 7, 50, 2000, 2001], 6))
    found = dict(fetch.read_samples(manifest, ids))
    assert {place: len(data) for place, data in found.items()} == dict.fromkeys(range(6), size)
    offset = 512 + 2048 * np.array([5, 50, 2000, 2001])
    assert asked == [(offset[0], offset[1] + size), (offset[2], offset[3] + size)]


def test_samples_come_in_stored_order_with_their_index(small):
    ids = np.array([51, 4, 5, 20, 4])
    samples = list(fetch.read_samples(small, ids))
    assert [int(ids[index]) for index, _ in samples] == [4, 4, 5, 20, 51]
    assert all(data == picture(int(ids[index])) for index, data in samples)
    assert list(fetch.read_samples(small, ids[:0])) == []


def test_a_sample_that_stays_wrong_has_a_reason(writable):
    damage(writable, 20)
    wrong = fetch.read_sample(writable, 20)
    assert isinstance(wrong, fetch.Unreadable) and wrong.reason == "crc32 mismatch"
    assert fetch.read_sample(writable, 21) == picture(21)


def test_a_sample_is_located_by_shard_and_member(small, tmp_path):
    assert fetch.locate_sample(small, 0) == ("t-000.tar", "img0.jpg")
    assert fetch.locate_sample(small, 20) == ("t-004.tar", "img20.jpg")
    manifest = make_set(str(tmp_path / "set"), (2,))
    (tmp_path / "set" / "t-000.tar").unlink()
    assert fetch.locate_sample(manifest, 1) == ("t-000.tar", "")
