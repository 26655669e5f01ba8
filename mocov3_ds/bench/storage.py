"""What reading shards from object storage costs, whether memory stays flat, how well samples mix.

    python -m mocov3_ds.bench stream [--aws PATH] [--s3fs-python PATH]

Reading: CPU time of the client alone (user and system, children included); the server is moto's,
in a process of its own, over plain HTTP on loopback. Each client reads the same shards of 100 MB
with 110 KB samples in a process of its own, in turn; the median of the rounds counts. `--aws` is an
awscli for webdataset's usual `pipe:aws s3 cp URL -`, `--s3fs-python` an interpreter that has s3fs;
rows of clients that are not there are left out. Memory: resident set of a rank that streams and
decodes small images from the same server, and the slope of a line through it. Mixing: pure
arithmetic on the order, for a set of the size of ImageNet.
"""

import io
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from mocov3_ds.data import fetch, sample_order, storage
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.manifest import ROW, Manifest, Shard
from mocov3_ds.data.views.spec import ViewSpec

_BUCKET = "s3://bench-stream"
_TAR_SAMPLES, _SAMPLE_BYTES = 900, 110_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """CPU of reading from S3, memory over many samples, and how well samples mix."""

    aws: str = ""
    """program `aws`; empty = the one on the path, if any"""
    s3fs_python: str = ""
    """interpreter with s3fs installed; empty = no such row"""
    shards: int = 4
    """shards of 100 MB that each client reads"""
    rounds: int = 3
    """times that each client runs"""
    samples: int = 1_000_000
    """samples streamed for the memory"""
    parts: tuple[Literal["mixing", "reading", "memory"], ...] = ("mixing", "reading", "memory")
    """what is measured"""


def command() -> None:
    """Entry point of `python -m mocov3_ds.bench stream`."""
    options = tyro.cli(Options, description=__doc__)
    with TemporaryDirectory() as folder, _server():
        if "mixing" in options.parts:
            _mixing()
        if "reading" in options.parts:
            _reading(options, folder)
        if "memory" in options.parts:
            _memory(options)


@contextmanager
def _server() -> Iterator[None]:
    """Moto's S3 server, and an environment in which every client finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MOCOV3_STORAGE_FIRST_CONTACT_S": "60",
    }
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import boto3

        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise ValueError(
                        "moto's server does not start; install it with pip install 'moto[server]'."
                    ) from None
                time.sleep(0.1)
        boto3.session.Session().client("s3").create_bucket(Bucket=_BUCKET.removeprefix("s3://"))
        yield
    finally:
        process.kill()
        process.wait()


def _make_set(url: str, images: list[bytes], per_shard: int) -> Manifest:
    """Write images as a sharded set."""
    shards, rows = [], []
    for number, start in enumerate(range(0, len(images), per_shard)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place, data in enumerate(images[start : start + per_shard]):
                info = tarfile.TarInfo(f"{start + place:08d}.jpg")
                info.size = len(data)
                rows.append((buffer.tell() + 512, len(data), zlib.crc32(data), 0, 0, 0, 0))
                tar.addfile(info, io.BytesIO(data))
        name = f"bench-{number:04d}.tar"
        storage.write(storage.join_url(url, name), buffer.getvalue())
        count = len(images[start : start + per_shard])
        shards.append(Shard(name, buffer.tell(), count, f"{number:064x}"))
    return manifests.write(url, shards, np.array(rows, dtype=ROW))


# ------------------------------------------------------------------------------------------ reading

_S3FS = """
import json, resource, sys, s3fs
fs = s3fs.S3FileSystem(skip_instance_cache=True)
total = 0
for url in sys.argv[1:]:
    with fs.open(url, "rb") as file:
        while block := file.read(1 << 20):
            total += len(block)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, total]))
"""


def _client(name: str, url: str, aws: str) -> None:
    """Read a set as the named client does; print CPU seconds and bytes."""
    found = manifests.load(url)
    tars = [found.shard_url(shard) for shard in range(len(found.shards))]
    before, total = _cpu_s(), 0
    if name == "samples":
        for ids in np.array_split(np.arange(found.samples), max(1, found.samples // 500)):
            for _, data in fetch.read_samples(found, np.random.default_rng(0).permutation(ids)):
                assert isinstance(data, bytes)
                total += len(data)
    elif name == "bytes":
        total = sum(len(block) for tar in tars for block in storage.read_blocks(tar))
    else:
        import webdataset

        pipes = [f"pipe:{aws} s3 cp {tar} -" if aws else tar for tar in tars]
        for sample in webdataset.WebDataset(pipes, shardshuffle=False, empty_check=False):
            total += len(sample["jpg"])
    print(json.dumps([_cpu_s() - before, total]))


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _reading(options: Options, folder: str) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(_SAMPLE_BYTES) for _ in range(options.shards * _TAR_SAMPLES)]
    url = f"{_BUCKET}/large"
    found = _make_set(url, images, _TAR_SAMPLES)
    _make_set(folder, images, _TAR_SAMPLES)
    tars = [found.shard_url(shard) for shard in range(len(found.shards))]
    aws = options.aws or shutil.which("aws") or ""
    own = [sys.executable, "-c", "import sys; from mocov3_ds.bench.storage import _client; "
           "_client(*sys.argv[1:])"]  # fmt: skip
    clients = {
        "ours: samples by range, crc32 of each": [*own, "samples", url, ""],
        "ours: bytes in order": [*own, "bytes", url, ""],
        "ours, from a local folder: samples, crc32 of each": [*own, "samples", folder, ""],
        "webdataset, from a local folder": [*own, "webdataset", folder, ""],
    }
    if aws:
        clients["webdataset, pipe:aws s3 cp"] = [*own, "webdataset", url, aws]
    if options.s3fs_python:
        clients["s3fs, 1 MB reads, no tar"] = [options.s3fs_python, "-c", _S3FS, *tars]
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(options.rounds):
        for name, arguments in clients.items():
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            used, total = json.loads(done.stdout.splitlines()[-1])
            assert total >= len(images) * _SAMPLE_BYTES, "not everything was read"
            seconds[name].append(used)
    gigabytes = len(images) * _SAMPLE_BYTES / 1e9
    first = statistics.median(next(iter(seconds.values())))
    print(f"\nReading {gigabytes:.2f} GB, median of {options.rounds}:\n")
    print("| client | CPU s/GB | us/sample | against ours |\n| --- | --- | --- | --- |")
    for name, values in seconds.items():
        used = statistics.median(values)
        cost = used / gigabytes, used / len(images) * 1e6, used / first
        print("| {} | {:.2f} | {:.0f} | {:.1f} x |".format(name, *cost))


# ------------------------------------------------------------------------------------------- memory


def _memory(options: Options) -> None:
    """Stream many small images and fit a line through the resident set."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(10_000):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    found = _make_set(f"{_BUCKET}/small", images, 1000)
    settings = LoaderSettings(
        views=ViewSpec(), image_size=32, global_batch=200, rank=0, world_size=1, seed=0,
        lanes=8, pool=2000, threads=2,
    )  # fmt: skip
    at, resident = [], []
    with Loader(found, settings) as loader:
        for batch in range(options.samples // 200):
            next(loader)
            if batch % 10 == 0:
                at.append(batch * 200)
                resident.append(_resident_bytes())
    print(f"\nMemory over {options.samples:,} samples from S3, pool of 2,000:\n")
    print("| samples | resident MB |\n| --- | --- |")
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
        place = min(int(share * len(at)), len(at) - 1)
        print(f"| {at[place]:,} | {resident[place] / 1e6:.1f} |")
    # the allocator's heaps have met every order of sizes by then
    half = len(at) // 2
    slope = np.polyfit(at[half:], resident[half:], 1)[0]
    print(f"\nslope of the second half: {slope:+.2f} bytes a sample")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# ------------------------------------------------------------------------------------------- mixing


def _mixing() -> None:
    """How lanes and pool change what meets in a batch."""
    samples, shards, batch = 1_281_000, 1281, 4096
    print(f"\nMixing, {shards:,} shards of 1,000 samples, global batch {batch}:\n")
    print(
        "| lanes | pool | samples of one read | travel | shards in a batch | of a sample's batch "
        "from its own shard | stored neighbours that share a batch |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count, pool in ((64, 32768), (1024, 8192), (1024, 32768), (1024, 131072), (0, 0)):
        if count:
            order = sample_order.Order((1000,) * shards, batch, 0, count, pool)
            ids_TB, row = order.epoch_ids(0), f"{count} | {pool:,} | {order.window_length}"
            travel = sample_order.mean_travel(order)
        else:  # what no shuffle within bounded memory reaches
            ids_TB = np.random.default_rng(0).permutation(samples)
            ids_TB = ids_TB[: samples // batch * batch].reshape(-1, batch)
            row, travel = "all shuffled | | ", 1.0
        counts_TS = np.stack([np.bincount(ids // 1000, minlength=shards) for ids in ids_TB])
        own = (counts_TS * (counts_TS - 1)).sum(1).mean() / (batch * (batch - 1))
        batch_N = np.full(samples, -1)
        batch_N[ids_TB] = np.arange(len(ids_TB))[:, None]
        together = ((batch_N[1:] == batch_N[:-1]) & (batch_N[1:] >= 0)).mean()
        print(
            f"| {row} | {travel:.2f} | {(counts_TS > 0).sum(1).mean():.0f} | {own:.3%} "
            f"| {together:.2%} |"
        )
