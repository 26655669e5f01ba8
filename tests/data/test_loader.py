"""The loader: the planned batches on any ranks and threads, in bounded memory."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mocov3_ds.data import loader as loader_module
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import RING
from mocov3_ds.data.sample_order import Order
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.photometric import augment_crops
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.loading import SIZES, copied, open_loader, run, same
from tests.data.sets import make_set, picture


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
        batches = run(small.first_samples(12), 1, 3, fixed_views=fixed)
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
    with open_loader(small) as loader:
        for position in range(6):
            ids, crops_VBCHW, params_VBP = copied(batch := next(loader))
            assert batch.labels_B.tolist() == [i % 10 for i in ids]
            assert batch.wait_s >= 0
            for row, sample_id in enumerate(ids):
                data = picture(sample_id)
                size = decode.read_size(data)
                drawn = draw_views(spec, 3, position // 4, sample_id, *size)
                expected = np.zeros((2, 3, 8, 8), np.uint8)
                decode.cut_crops(data, drawn[0], drawn[1], expected)
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
            augment_crops(crops_BCHW, params_BP)
        assert torch.equal(crops_VBCHW, done_VBCHW)


def test_resuming_reads_nothing_that_was_used(small, monkeypatch):
    read = []
    real = loader_module.read_samples

    def watching(manifest, sample_ids_M, **options):
        read.extend(sample_ids_M.tolist())
        return real(manifest, sample_ids_M, **options)

    monkeypatch.setattr(loader_module, "read_samples", watching)
    order = Order(SIZES, 12, 3, 4, 24)
    with open_loader(small, position=2, readers=1) as loader:
        next(loader)
        next(loader)
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


# ---------------------------------------------------------------------------------------- resources


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_threads_and_files_end_with_the_loader(small):
    threads, files = threading.active_count(), open_files()
    for batches in (0, 1, 5):
        loader = open_loader(small, threads=3)
        for _ in range(batches):
            next(loader)
        if batches:
            assert threading.active_count() > threads
        loader.close()
        loader.close()
        assert threading.active_count() == threads
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    assert open_files() <= files


def test_samples_that_are_being_decoded_are_named(small, monkeypatch):
    make_crops, said = loader_module.make_crops, []

    def make(*args, **settings):
        said.append(loader.describe_work())
        make_crops(*args, **settings)

    monkeypatch.setattr(loader_module, "make_crops", make)
    with open_loader(small, threads=0) as loader:
        assert loader.describe_work() == ""
        batch = next(loader)
        assert loader.describe_work() == ""
        ids = batch.sample_ids_B.tolist()
    names = [shard.name for shard in small.shards for _ in range(shard.samples)]
    assert said == [
        f"decoding sample {i} (byte {small.index_N['offset'][i]} of {names[i]!r})" for i in ids
    ]


def test_no_more_threads_is_said_and_not_what_follows(small, monkeypatch):
    class Thread(threading.Thread):
        count = 0

        def start(self):
            Thread.count += 1
            if Thread.count > 2:
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(loader_module.threading, "Thread", Thread)
    loader = open_loader(small, threads=2)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(loader)
    loader.close()


def test_a_batch_stays_until_the_second_next(small):
    with open_loader(small, threads=3) as loader:
        one = next(loader)
        kept = one.crops_VBCHW.clone()
        next(loader)
        assert torch.equal(one.crops_VBCHW, kept)
        addresses = {next(loader).crops_VBCHW.data_ptr() for _ in range(12)}
    assert len(addresses) == RING


class LateCopy:
    """A copy to a GPU that reads the memory as late as it may: when somebody waits for it."""

    def __init__(self, crops_VBCHW):
        self.source_VBCHW, self.read_VBCHW = crops_VBCHW, None

    def wait(self):
        assert self.read_VBCHW is None
        self.read_VBCHW = self.source_VBCHW.clone()


@pytest.mark.parametrize("threads", [0, 3])
def test_a_buffer_is_written_again_only_after_its_copy(small, threads, monkeypatch):
    def start_copy(buffer):
        buffer.copy = LateCopy(buffer.crops_VBCHW)

    expected = [crops_VBCHW for _, crops_VBCHW, _ in run(small, 1, 12)]
    monkeypatch.setattr(loader_module.BatchBuffer, "start_copy", start_copy)
    with open_loader(small, threads=threads) as loader:
        copies = [next(loader).copy for _ in range(12)]
    assert len({id(copy) for copy in copies}) == 12
    assert [copy.read_VBCHW is None for copy in copies] == [False] * 10 + [True] * 2
    for copy, crops_VBCHW in zip(copies[:10], expected, strict=False):
        assert torch.equal(copy.read_VBCHW, crops_VBCHW)


def test_memory_is_bounded_by_pool_and_read_ahead(small):
    """A caller that never asks again must not make the readers fetch on and on."""
    with open_loader(small, pool=4, lanes=1, read_ahead_bytes=4000) as loader:
        next(loader)
        reading = loader._read_ahead
        limit = reading.byte_limit + 24 * int(small.index_N["size"].max())
        for _ in range(20):
            next(loader)
            with loader._lock:
                assert 0 <= reading.held_bytes <= limit
                assert max(reading.batches, default=0) <= loader._next_position + 10


def test_sizes_in_the_index_are_not_trusted(small):
    for size in (0, 65535):
        index_N = small.index_N.copy()
        index_N["width"] = index_N["height"] = size
        other = manifests.Manifest(small.url, small.shards, index_N)
        assert same(run(other, 2, 5), run(small, 2, 5))
