"""The loader against S3 servers that work, that fail all the time, and that are killed."""

import io
import os
import tarfile
import threading
import time
from collections import Counter

import pytest
import torch
from PIL import Image

from data_prep.index import index_tars
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.sample_order import Order
from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.cache import Cache
from tests import object_store
from tests.data.loading import SIZES, copied, open_loader, run, same
from tests.data.sets import make_set, picture
from tests.fault_proxy import FaultProxy

FAULTS = {
    "503": 0.1,
    "reset": 0.1,
    "truncate": 0.1,
    "refuse": 0.05,
    "wrong": 0.05,
    "stall": 0.02,
    "trickle": 0.02,
    "early": 0.03,
    "nolength": 0.03,
    "oddrange": 0.03,
}
LIMITS = {"stall_s": 1.0, "low_bytes_s": 200_000, "connect_s": 30, "patience_s": 600}
"""Silence is given up soon, but the store is waited for, as a slow machine may need it."""


@pytest.fixture(scope="module")
def stored(s3_server, tmp_path_factory):
    """The same small set in a folder and in S3; what the folder streams."""
    local = make_set(str(tmp_path_factory.mktemp("local") / "set"), SIZES)
    with object_store.environment(s3_server.url):
        make_set("s3://bucket/small", SIZES)
    return "s3://bucket/small", run(local, 1, 40)


def test_s3_streams_what_a_folder_does(s3_server, stored):
    url, expected = stored
    with object_store.environment(s3_server.url):
        manifest = manifests.load(url)
        for world_size, threads in ((1, 0), (3, 2)):
            assert same(run(manifest, world_size, 9, threads=threads), expected[:9])
        assert same(run(manifest, 2, 5, position=4), expected[4:9])


def stream_under_faults(server, stored, wanted, seed):
    url, expected = stored
    with object_store.environment(server.url):
        manifest = manifests.load(url)
    shards_only = str.endswith
    with (
        FaultProxy(
            server.url, FAULTS, seed=seed, only=lambda path: shards_only(path, ".tar")
        ) as proxy,
        object_store.environment(proxy.url, **LIMITS),
    ):
        position = 0
        while sum(proxy.injected.values()) < wanted:
            at = position % 40
            count = min(12, 40 - at)
            found = run(manifest, 2, count, position=at, threads=1)
            assert same(found, expected[at : at + count])
            position += count
    return proxy.injected


def test_faults_lose_nothing_and_repeat_nothing(s3_server, stored):
    injected = stream_under_faults(s3_server, stored, 100, seed=1)
    assert {"503", "reset", "truncate", "refuse"} <= set(injected)
    # nearly each fault costs an attempt; some answers end in time
    assert counters.take_counts()["store_retries"] >= 50


@pytest.mark.slow
def test_a_thousand_faults_lose_nothing_and_repeat_nothing(s3_server, stored):
    started = time.monotonic()
    injected = stream_under_faults(s3_server, stored, 1000, seed=2)
    print(f"{dict(injected)} in {time.monotonic() - started:.0f} s")
    assert set(injected) == set(FAULTS)


def test_bytes_that_stay_wrong_are_bad_samples(s3_server, stored):
    url, _ = stored
    with object_store.environment(s3_server.url):
        manifest = manifests.load(url)
    only = lambda path: path.endswith("t-000.tar")  # noqa: E731
    with (
        FaultProxy(s3_server.url, {"wrong": 1.0}, only=only) as proxy,
        object_store.environment(proxy.url),
        open_loader(manifest, bad_sample_budget=5) as loader,
    ):
        for _ in range(8):
            next(loader)
        assert set(loader.bad_samples.counts) == {"crc32 mismatch"}


def test_the_server_is_killed_and_started_again(tmp_path):
    local = make_set(str(tmp_path / "local"), SIZES)
    expected = run(local, 1, 24)
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    server = object_store.Rclone(tmp_path / "buckets")
    server.start()
    try:
        with object_store.environment(server.url, **LIMITS):
            make_set("s3://bucket/set", SIZES)
            back = None
            found = []
            with open_loader(manifests.load("s3://bucket/set"), pool=24) as loader:
                for position in range(24):
                    if position in (5, 15):
                        server.stop()
                        back = threading.Timer(1.0, server.start)
                        back.start()
                    found.append(copied(next(loader)))
                    if back is not None and position in (10, 20):
                        back.join()
            assert same(found, expected)
    finally:
        server.stop()


def test_the_cache_saves_the_second_epoch_and_heals(s3_server, stored, tmp_path):
    url, expected = stored
    cache = Cache(tmp_path / "cache", 1 << 30)
    blocks = lambda: (tmp_path / "cache").rglob("*-0")  # noqa: E731
    with object_store.environment(s3_server.url):
        manifest = manifests.load(url)
    with FaultProxy(s3_server.url, {}) as proxy, object_store.environment(proxy.url, stall_s=120):
        counters.take_counts()
        assert same(run(manifest, 2, 8, cache=cache), expected[:8])
        filled = proxy.requests
        assert filled <= len(SIZES)
        counted = counters.take_counts()
        assert counted["store_bytes"] >= sum(block.stat().st_size for block in blocks())
        assert counted["cache_misses"] >= len(list(blocks()))
        assert same(run(manifest, 4, 8, cache=cache), expected[:8])
        assert proxy.requests == filled
        assert set(counters.take_counts()) == {"cache_hits"}
        for block in blocks():  # the disk goes bad
            data = bytearray(block.read_bytes())
            data[600:700] = bytes(100)
            block.write_bytes(data)
        assert same(run(manifest, 1, 8, cache=cache), expected[:8])
        assert proxy.requests > filled
        healed = proxy.requests
        assert same(run(manifest, 1, 8, cache=cache), expected[:8])
        assert proxy.requests - healed < healed - filled


# ------------------------------------------------------------------------------- five hundred JPEGs


def five_hundred():
    """Real JPEGs from the tar that MOCOV3_TEST_IMAGES names, or drawn ones of that size."""
    if name := os.environ.get("MOCOV3_TEST_IMAGES"):
        with tarfile.open(name) as tar:
            files = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
            return [tar.extractfile(m).read() for m in files[:500]]
    images = []
    for number in range(500):
        with Image.open(io.BytesIO(picture(number, 40))) as small:
            buffer = io.BytesIO()
            small.resize((480, 360)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


@pytest.mark.slow
def test_five_hundred_jpegs_from_s3_on_any_ranks_and_threads(s3_server):
    images = five_hundred()
    sizes = (64, 1, 150, 30, 64, 91, 100)
    assert len(images) == sum(sizes)
    with object_store.environment(s3_server.url):
        manifest = make_set("s3://bucket/jpegs", sizes, image=images.__getitem__)
        options = {"global_batch": 12, "lanes": 6, "pool": 120, "image_size": 16}
        order = Order(sizes, 12, 3, 6, 120)
        epoch = order.batches_per_epoch
        expected = None
        for world_size in (1, 2, 3, 4):
            for threads in (0, 1, 3):
                found = run(manifest, world_size, 3 * epoch, threads=threads, **options)
                expected = expected or found
                assert same(found, expected)
        left_out = Counter()
        for start in range(0, 3 * epoch, epoch):
            ids = Counter(i for batch in expected[start : start + epoch] for i in batch[0])
            assert max(ids.values()) == 1 and len(ids) == 500 - 8
            left_out.update(set(range(500)) - set(ids))
        assert max(left_out.values()) == 1
        for stop, world_size in ((1, 4), (40, 3), (41, 2), (100, 1)):
            found = run(manifest, world_size, 3, position=stop, **options)
            assert same(found, expected[stop : stop + 3])
        exact = run(manifest, 4, 25, threads=3, global_batch=20, lanes=6, pool=120, image_size=16)
        assert sorted(i for batch in exact for i in batch[0]) == list(range(500))
        seen = [
            i
            for rank in range(3)
            for _, _, ids in evaluation_batches(
                manifest, image_size=16, batch=64, rank=rank, world_size=3, threads=2
            )
            for i in ids.tolist()
        ]
        assert sorted(seen) == list(range(500))
        assert torch.is_tensor(expected[0][1])


def test_tars_that_others_wrote_stream_from_s3(s3_server, tmp_path):
    import webdataset

    names = ["plain", "other", "deep/er/" + "long" * 40, "ümlaut"]
    with webdataset.ShardWriter(f"{tmp_path}/part-%03d.tar", maxcount=9, verbose=0) as writer:
        for number in range(23):
            key = f"{names[number % 4]}-{number}"
            writer.write({"__key__": key, "jpg": picture(number), "cls": number % 7})
    with object_store.environment(s3_server.url):
        url = "s3://bucket/foreign"
        for tar in sorted(tmp_path.glob("*.tar")):
            storage.write(storage.join_url(url, tar.name), tar.read_bytes())
        made = index_tars(url, workers=1)
        assert [shard.samples for shard in made.shards] == [9, 9, 5]
        manifest = manifests.load(url)
        found = run(manifest, 2, 2, global_batch=10)
        ids = [i for batch in found for i in batch[0]]
        assert len(ids) == len(set(ids)) == 20
        assert manifest.index_N["label"].tolist() == [i % 7 for i in range(23)]
        with open_loader(manifest, global_batch=23) as loader:
            assert sorted(next(loader).sample_ids_B.tolist()) == list(range(23))
            assert not loader.bad_samples.counts
