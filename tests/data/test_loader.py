"""The loader: the planned batches on any ranks and threads, and what bad samples do."""

import json
import random
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mocov3_ds.data import loader as stream_module
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.loader import Stream, evaluation_batches
from mocov3_ds.data.sample_order import Order
from mocov3_ds.data.views import decode, photometric
from mocov3_ds.data.views.photometric import ViewSpec, augment
from tests.data.sets import make_set, picture

SIZES = (5, 9, 1, 0, 30, 7)


def open_stream(manifest, **changes):
    settings = {
        "views": ViewSpec(),
        "image_size": 8,
        "global_batch": 12,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "lanes": 4,
        "pool": 24,
        "threads": 2,
    }
    return Stream(manifest, **(settings | changes))


def copied(batch):
    """A batch whose tensors stay."""
    return batch.ids_B.tolist(), batch.crops_VBCHW.clone(), batch.params_VBP.clone()


def run(manifest, world_size, batches, **changes):
    """Global batches put together from all ranks: ids, crops, parameters."""
    ranks = [
        open_stream(manifest, rank=rank, world_size=world_size, **changes)
        for rank in range(world_size)
    ]
    out = []
    try:
        for _ in range(batches):
            parts = [copied(next(stream)) for stream in ranks]
            ids = [i for part in parts for i in part[0]]
            out.append((ids, *(torch.cat([p[k] for p in parts], 1) for k in (1, 2))))
    finally:
        for stream in ranks:
            stream.close()
    return out


def same(a, b):
    return all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2])
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("small") / "set"), SIZES)


@pytest.fixture
def writable(tmp_path):
    """A set of one's own, to damage."""
    return make_set(str(tmp_path / "set"), SIZES)


def test_ranks_and_threads_change_nothing(small):
    batches = 3 * (52 // 12)
    expected = run(small, 1, batches, threads=0)
    order = Order(SIZES, 12, 3, 4, 24)
    assert [ids for ids, _, _ in expected] == [order.batch_ids(t).tolist() for t in range(batches)]
    for epoch in range(3):
        ids = [i for batch in expected[epoch * 4 : epoch * 4 + 4] for i in batch[0]]
        assert len(ids) == len(set(ids)) == 48
    for world_size in (1, 2, 3, 4, 6, 12):
        for threads in (0, 1, 3):
            assert same(run(small, world_size, batches, threads=threads), expected)


def test_fixed_views_are_those_of_the_first_epoch(small):
    views_of = {}
    for fixed in (True, False):
        batches = run(small.first(12), 1, 3, fixed_views=fixed)
        views_of[fixed] = [
            {i: params_VBP[:, row].tolist() for row, i in enumerate(ids)}
            for ids, _, params_VBP in batches
        ]
    first, second, third = views_of[True]
    assert {*first} == {*range(12)}
    assert first == second == third == views_of[False][0]
    assert views_of[False][1] != first


def test_the_pixels_are_those_of_the_sample(small):
    spec = ViewSpec()
    with open_stream(small) as stream:
        for position in range(6):
            ids, crops_VBCHW, params_VBP = copied(batch := next(stream))
            assert batch.labels_B.tolist() == [i % 10 for i in ids]
            assert batch.wait_s >= 0
            for row, sample_id in enumerate(ids):
                data = picture(sample_id)
                size = decode.size_of(data)
                drawn = photometric.draw(spec, 3, position // 4, sample_id, *size)
                expected = np.zeros((2, 3, 8, 8), np.uint8)
                decode.two_crops(data, drawn[0], drawn[1], expected)
                np.testing.assert_array_equal(crops_VBCHW[:, row].numpy(), expected)
                np.testing.assert_array_equal(params_VBP[:, row].numpy(), drawn[2])


@pytest.mark.parametrize("position", [0, 1, 3, 4, 7])
def test_a_run_goes_on_at_another_world_size(small, position):
    unbroken = run(small, 2, position + 6)
    assert same(run(small, 4, 6, position=position, threads=1), unbroken[position:])
    assert same(run(small, 1, 6, position=position, threads=3), unbroken[position:])


def test_colour_in_the_threads_is_the_colour_afterwards(small):
    plain = run(small, 2, 3)
    for (ids, crops_VBCHW, params_VBP), (other_ids, done_VBCHW, _) in zip(
        plain, run(small, 2, 3, augment=True), strict=True
    ):
        assert ids == other_ids
        assert not torch.equal(crops_VBCHW, done_VBCHW)
        for crops_BCHW, params_BP in zip(crops_VBCHW.numpy(), params_VBP.numpy(), strict=True):
            augment(crops_BCHW, params_BP)
        assert torch.equal(crops_VBCHW, done_VBCHW)


def test_resuming_reads_nothing_that_was_used(small, monkeypatch):
    read = []
    real = stream_module.fetch

    def watching(manifest, ids_M, **options):
        read.extend(ids_M.tolist())
        return real(manifest, ids_M, **options)

    monkeypatch.setattr(stream_module, "fetch", watching)
    monkeypatch.setattr(stream_module, "READERS", 1)
    order = Order(SIZES, 12, 3, 4, 24)
    with open_stream(small, position=2) as stream:
        next(stream)
        next(stream)
    # the rest of the epoch comes first, and of it only what is still needed
    assert set(read[:24]) == {i for t in (2, 3) for i in order.batch_ids(t).tolist()}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_set_any_ranks_stop_anywhere(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(sum))
    batch = data.draw(st.integers(1, sum(sizes)))
    divisors = [w for w in range(1, 6) if batch % w == 0]
    options = {
        "global_batch": batch,
        "lanes": data.draw(st.integers(1, 8)),
        "pool": data.draw(st.integers(1, 60)),
        "image_size": 4,
    }
    manifest = make_set(str(tmp_path_factory.mktemp("any") / "set"), sizes)
    order = Order(tuple(sizes), batch, 3, options["lanes"], options["pool"])
    stop = data.draw(st.integers(0, 2 * order.batches_per_epoch))
    end = stop + order.batches_per_epoch + 1
    expected = [order.batch_ids(t).tolist() for t in range(end)]
    first = run(manifest, data.draw(st.sampled_from(divisors)), stop, threads=1, **options)
    world = data.draw(st.sampled_from(divisors))
    second = run(manifest, world, end - stop, position=stop, threads=2, **options)
    assert [ids for ids, _, _ in first + second] == expected


# -------------------------------------------------------------------------------------- bad samples


def damage(manifest, sample_id, at=200, new=b"\0\xff\0\xff\0\xff", mend_crc=False):
    """Overwrite bytes of a sample in its shard; returns the manifest to use."""
    shard = int(np.searchsorted(manifest.first_S, sample_id, side="right")) - 1
    row = manifest.index_N[sample_id]
    offset, size = int(row["offset"]), int(row["size"])
    path = Path(manifest.shard_url(shard))
    tar = bytearray(path.read_bytes())
    tar[offset + at : offset + at + len(new)] = new
    path.write_bytes(tar)
    if not mend_crc:
        return manifest
    index_N = manifest.index_N.copy()
    index_N["crc32"][sample_id] = zlib.crc32(tar[offset : offset + size])
    manifests.write(manifest.url, manifest.shards, index_N)
    return manifests.load(manifest.url)


def test_bad_samples_are_remembered_by_the_next_sitting(writable, tmp_path):
    for sample in (4, 20, 33):
        damage(writable, sample)
    listing = tmp_path / "bad_samples.jsonl"
    options = {"bad_sample_budget": 3, "bad_samples": listing, "threads": 1}
    with open_stream(writable, **options) as stream:
        for _ in range(6):
            next(stream)
        before = stream.bad
    assert before and set(before.values()) == {"crc32 mismatch"}
    again = dict(options, bad_before=before)
    with open_stream(writable, **again) as stream:
        assert stream.bad == before
        for _ in range(12):
            next(stream)
        assert set(stream.bad) == {4, 20, 33}
        assert stream.skipped == {"crc32 mismatch": 3}
    lines = [json.loads(line)["id"] for line in listing.read_text().splitlines()]
    assert sorted(lines) == [4, 20, 33]
    # two ranks share what was met before, and what they meet counts against the same budgets
    ranks = [
        open_stream(writable, world_size=2, rank=rank, bad_before=stream.bad) for rank in (0, 1)
    ]
    assert sorted(sum(each.skipped.values()) for each in ranks) == [1, 2]
    assert all(each.bad == stream.bad for each in ranks)
    for each in ranks:
        each.close()
    with (
        open_stream(writable, bad_sample_budget=2, bad_before={90: "not an image"}) as stream,
        pytest.raises(ValueError, match=r"3 unreadable samples in .*, more than"),
    ):
        for _ in range(12):
            next(stream)


def test_wrong_bytes_are_caught_counted_listed_and_replaced(writable, tmp_path):
    damage(writable, 4)
    damage(writable, 20)
    good = damage(writable, 33, at=0, new=b"not a JPEG", mend_crc=True)
    listing = tmp_path / "run" / "bad_samples.jsonl"
    results = []
    for world_size, threads in ((1, 0), (1, 3), (2, 1), (4, 2)):
        listing.unlink(missing_ok=True)
        options = {"threads": threads, "bad_sample_budget": 3, "bad_samples": listing}
        results.append(run(good, world_size, 12, **options))
    assert all(same(result, results[0]) for result in results)
    ids = Counter(i for batch in results[0] for i in batch[0])
    assert sum(ids.values()) == 144 and not {4, 20, 33} & set(ids)
    order = Order(SIZES, 12, 3, 4, 24)
    for t, (found, _, _) in enumerate(results[0]):
        differs = [
            planned
            for planned, got in zip(order.batch_ids(t).tolist(), found, strict=True)
            if planned != got
        ]
        assert set(differs) <= {4, 20, 33}
    with open_stream(good, bad_sample_budget=3, bad_samples=listing) as stream:
        listing.unlink()
        for _ in range(12):
            next(stream)
        assert stream.skipped == {"crc32 mismatch": 2, "not an image": 1}
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert {line["id"]: (line["shard"], line["key"]) for line in lines} == {
        4: ("t-000.tar", "img4.jpg"),
        20: ("t-004.tar", "img20.jpg"),
        33: ("t-004.tar", "img33.jpg"),
    }
    assert all(line["rank"] == 0 and line["reason"] for line in lines)


@pytest.mark.parametrize("threads", [0, 2])
def test_over_the_budget_the_run_stops_and_says_which(writable, threads):
    damage(writable, 4)
    damage(writable, 20)
    with (
        open_stream(writable, threads=threads, bad_sample_budget=1) as stream,
        pytest.raises(
            ValueError,
            match=r"2 unreadable samples in .* more than --data.max_bad_samples 1 "
            r"\(2 x crc32 mismatch\); the last one is img(4|20)\.jpg in t-00[04]\.tar",
        ),
    ):
        for _ in range(8):
            next(stream)


def test_a_truncated_shard_is_bad_samples_not_silence(writable):
    path = Path(writable.shard_url(4))
    path.write_bytes(path.read_bytes()[: int(writable.index_N["offset"][30]) - 512])
    with open_stream(writable, bad_sample_budget=50) as stream:
        for _ in range(8):
            assert len(next(stream).ids_B) == 12
        assert sum(stream.skipped.values()) >= 10
        assert set(stream.skipped) == {"shard ends early"}


def test_a_missing_shard_stops_the_run(writable):
    Path(writable.shard_url(1)).unlink()
    with open_stream(writable) as stream, pytest.raises(FileNotFoundError, match=r"t-001\.tar"):
        for _ in range(8):
            next(stream)


def test_a_set_of_rubbish_ends(writable):
    for sample_id in range(52):
        damage(writable, sample_id)
    with (
        open_stream(writable, bad_sample_budget=1000) as stream,
        pytest.raises(ValueError, match="stand in for it are all unreadable"),
    ):
        next(stream)


# ---------------------------------------------------------------------------------------- resources


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_threads_and_files_end_with_the_stream(small):
    threads, files = threading.active_count(), open_files()
    for batches in (0, 1, 5):
        stream = open_stream(small, threads=3)
        for _ in range(batches):
            next(stream)
        if batches:
            assert threading.active_count() > threads
        stream.close()
        stream.close()
        assert threading.active_count() == threads
        with pytest.raises(ValueError, match="closed"):
            next(stream)
    assert open_files() <= files


def test_a_batch_stays_until_the_second_next(small):
    with open_stream(small, threads=3) as stream:
        one = next(stream)
        kept = one.crops_VBCHW.clone()
        next(stream)
        assert torch.equal(one.crops_VBCHW, kept)
        addresses = {next(stream).crops_VBCHW.data_ptr() for _ in range(12)}
    assert len(addresses) == stream_module.RING


def test_memory_is_bounded_by_pool_and_read_ahead(small, monkeypatch):
    """A caller that never asks again must not make the readers fetch on and on."""
    monkeypatch.setattr(stream_module, "READ_AHEAD", 4000)
    with open_stream(small, pool=4, lanes=1) as stream:
        next(stream)
        limit = stream._room + 24 * int(small.index_N["size"].max())
        for _ in range(20):
            next(stream)
            with stream._lock:
                assert 0 <= stream._held <= limit
                assert max(stream._gathering, default=0) <= stream._to_decode + 10


def test_sizes_in_the_index_are_not_trusted(small):
    for size in (0, 65535):
        index_N = small.index_N.copy()
        index_N["width"] = index_N["height"] = size
        other = manifests.Manifest(small.url, small.shards, index_N)
        assert same(run(other, 2, 5), run(small, 2, 5))


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("world_size, batch", [(1, 100), (1, 7), (3, 5), (4, 64)])
def test_evaluation_sees_each_sample_once(small, world_size, batch, threads):
    seen = []
    for rank in range(world_size):
        for crops_BCHW, labels_B, ids_B in evaluation_batches(
            small,
            image_size=8,
            resize=9,
            batch=batch,
            rank=rank,
            world_size=world_size,
            threads=threads,
        ):
            assert 0 < len(ids_B) <= batch
            seen += ids_B.tolist()
            assert labels_B.tolist() == [i % 10 for i in ids_B.tolist()]
            for crop_CHW, sample_id in zip(crops_BCHW.numpy(), ids_B.tolist(), strict=True):
                expected = decode.centre_crop(picture(sample_id), 8, 9)
                np.testing.assert_array_equal(crop_CHW, expected)
    assert sorted(seen) == list(range(52))


def test_evaluation_of_a_subset_and_with_bad_samples(writable):
    options = {"image_size": 8, "resize": 9, "batch": 8, "threads": 2}
    some = [
        ids.tolist()
        for rank in range(2)
        for _, _, ids in evaluation_batches(writable, rank=rank, world_size=2, limit=13, **options)
    ]
    assert sorted(i for ids in some for i in ids) == [i * 52 // 13 for i in range(13)]
    damage(writable, 4)
    whole = {"rank": 0, "world_size": 1, **options}
    with pytest.raises(ValueError, match=r"img4\.jpg in t-000\.tar"):
        list(evaluation_batches(writable, **whole))
    found = [
        i for _, _, ids in evaluation_batches(writable, bad_sample_budget=1, **whole) for i in ids
    ]
    assert sorted(map(int, found)) == [i for i in range(52) if i != 4]


def test_an_abandoned_evaluation_ends_its_threads(small):
    before = threading.active_count()
    batches = evaluation_batches(
        small, image_size=8, resize=9, batch=4, rank=0, world_size=1, threads=3
    )
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_runs_are_read_together():
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
    real = storage.open_read

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

    storage.open_read = open_read
    try:
        ids = np.array(random.Random(0).sample([5, 6, 7, 50, 2000, 2001], 6))
        found = dict(stream_module.fetch(manifest, ids))
    finally:
        storage.open_read = real
    assert {place: len(data) for place, data in found.items()} == dict.fromkeys(range(6), size)
    offset = 512 + 2048 * np.array([5, 50, 2000, 2001])
    assert asked == [(offset[0], offset[1] + size), (offset[2], offset[3] + size)]
