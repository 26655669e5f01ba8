"""What does reading from object storage cost, does memory stay flat, how well do samples mix?

    python -m mocov3_ds.bench storage [--aws PATH] [--s3fs-python PATH]

Reading: CPU time of the client alone (user and system, children included). The server is moto's, in
a separate process, over plain HTTP on loopback. Each client reads the same shards of 100 MB with
110 KB samples in a new process, in turn; the median of the rounds counts. `--aws` is an awscli for
webdataset's usual `pipe:aws s3 cp URL -`, `--s3fs-python` an interpreter that has s3fs; rows of
missing clients are left out. Memory: resident set of a rank that loads and decodes small images
from the same server, and the slope of a line through it. Mixing: arithmetic on the sample order,
for a set of the size of ImageNet.
"""

import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocov3_ds.bench.resource_use import resident_bytes, used_cpu_seconds
from mocov3_ds.data import fetch, sample_order, storage
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.manifest import ROW, Manifest, Shard
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks

_BUCKET = "s3://bench-storage"
_TAR_SAMPLES, _SAMPLE_BYTES = 900, 110_000


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
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
    """samples that are loaded for the memory"""
    parts: tuple[Literal["mixing", "reading", "memory"], ...] = ("mixing", "reading", "memory")
    """what is measured"""


def run_bench(options: StorageOptions) -> None:
    """Print the tables."""
    if "mixing" in options.parts:
        print_mixing()
    if {"reading", "memory"} & {*options.parts}:
        with TemporaryDirectory() as folder, serve_s3():
            if "reading" in options.parts:
                print_reading(options, folder)
            if "memory" in options.parts:
                print_memory(f"{_BUCKET}/small", options.samples)


@contextmanager
def serve_s3() -> Iterator[None]:
    """Run moto's S3 server, with an environment in which every client finds it.

    Raises:
        ValueError: the server does not start.
    """
    port = ranks.free_port()
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


def write_set(url: str, images: list[bytes], per_shard: int) -> Manifest:
    """Write images as a sharded set, without labels."""
    shards, rows = [], []
    for number, start in enumerate(range(0, len(images), per_shard)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, image_bytes in enumerate(images[start : start + per_shard], start):
                info = tarfile.TarInfo(f"{sample:08d}.jpg")
                info.size = len(image_bytes)
                crc32 = zlib.crc32(image_bytes)
                rows.append((buffer.tell() + 512, len(image_bytes), crc32, 0, 0, 0, 0))
                tar.addfile(info, io.BytesIO(image_bytes))
        name = f"bench-{number:04d}.tar"
        storage.write(storage.join_url(url, name), buffer.getvalue())
        count = len(images[start : start + per_shard])
        shards.append(Shard(name, buffer.tell(), count, f"{number:064x}"))
    return manifests.write(url, shards, np.array(rows, dtype=ROW))


# ----------------------------------------------------------------------------------------- reading

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


def run_client(name: str, url: str, aws: str) -> None:
    """Read a set as the named client does, and print CPU seconds and bytes as JSON.

    Args:
        name: "samples" or "bytes" for ours, else webdataset.
        url: folder or URL of the set.
        aws: program that webdataset reads through; empty = it opens files itself.
    """
    manifest = manifests.load(url)
    tars = [manifest.shard_url(shard) for shard in range(len(manifest.shards))]
    start, total = used_cpu_seconds(), 0
    if name == "samples":
        for ids in np.array_split(np.arange(manifest.samples), max(1, manifest.samples // 500)):
            for _, content in fetch.read_samples(
                manifest, np.random.default_rng(0).permutation(ids)
            ):
                assert isinstance(content, bytes)
                total += len(content)
    elif name == "bytes":
        total = sum(len(block) for tar in tars for block in storage.read_blocks(tar))
    else:
        import webdataset

        pipes = [f"pipe:{aws} s3 cp {tar} -" if aws else tar for tar in tars]
        for sample in webdataset.WebDataset(pipes, shardshuffle=False, empty_check=False):
            total += len(sample["jpg"])
    print(json.dumps([used_cpu_seconds() - start, total]))


def client_commands(
    options: StorageOptions, url: str, folder: str, tars: Sequence[str]
) -> dict[str, list[str]]:
    """The command of each client that this machine has."""
    aws = options.aws or shutil.which("aws") or ""
    script = "import sys; from mocov3_ds.bench.storage import run_client; run_client(*sys.argv[1:])"
    python = [sys.executable, "-c", script]
    commands = {
        "ours: samples by range, crc32 of each": [*python, "samples", url, ""],
        "ours: bytes in order": [*python, "bytes", url, ""],
        "ours, from a local folder: samples, crc32 of each": [*python, "samples", folder, ""],
        "webdataset, from a local folder": [*python, "webdataset", folder, ""],
    }
    if aws:
        commands["webdataset, pipe:aws s3 cp"] = [*python, "webdataset", url, aws]
    if options.s3fs_python:
        commands["s3fs, 1 MB reads, no tar"] = [options.s3fs_python, "-c", _S3FS, *tars]
    return commands


def print_reading(options: StorageOptions, folder: str) -> None:
    """Let all clients read the same set in turns, and print their CPU time.

    Raises:
        ValueError: a client failed.
    """
    rng = np.random.default_rng(0)
    images = [rng.bytes(_SAMPLE_BYTES) for _ in range(options.shards * _TAR_SAMPLES)]
    url = f"{_BUCKET}/large"
    manifest = write_set(url, images, _TAR_SAMPLES)
    write_set(folder, images, _TAR_SAMPLES)
    tars = [manifest.shard_url(shard) for shard in range(len(manifest.shards))]
    commands = client_commands(options, url, folder, tars)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise ValueError(f"{name}: {process.stderr.strip().splitlines()[-1]}")
            used, total = json.loads(process.stdout.splitlines()[-1])
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


# ------------------------------------------------------------------------------------------ memory


def print_memory(url: str, samples: int) -> None:
    """Load many small images and fit a line through the resident set."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(10_000):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    settings = LoaderSettings(
        views=ViewSpec(), image_size=32, global_batch=200, rank=0, world_size=1, seed=0,
        lanes=8, pool=2000, threads=2,
    )  # fmt: skip
    counts, resident = [], []
    with Loader(write_set(url, images, 1000), settings) as loader:
        for batch in range(samples // 200):
            next(loader)
            if batch % 10 == 0:
                counts.append(batch * 200)
                resident.append(resident_bytes())
    print(f"\nMemory over {samples:,} samples from S3, pool of 2,000:\n")
    print("| samples | resident MB |\n| --- | --- |")
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
        row = min(int(share * len(counts)), len(counts) - 1)
        print(f"| {counts[row]:,} | {resident[row] / 1e6:.1f} |")
    # by then the heaps of the allocator have seen every order of sizes
    half = len(counts) // 2
    slope = np.polyfit(counts[half:], resident[half:], 1)[0]
    print(f"\nslope of the second half: {slope:+.2f} bytes a sample")


# ------------------------------------------------------------------------------------------ mixing


class Mixing(NamedTuple):
    """How well the samples of a set are mixed."""

    shards_in_batch: float
    """mean number of shards that a batch has samples of"""
    same_shard: float
    """share of the other samples in a sample's batch that come from its shard"""
    neighbours_together: float
    """share of pairs of stored neighbours that share a batch"""


def print_mixing(
    shards: int = 1281,
    batch: int = 4096,
    cases: Sequence[tuple[int, int]] = ((64, 32768), (1024, 8192), (1024, 32768), (1024, 131072)),
) -> None:
    """Print how lanes and pool change which samples meet in a batch."""
    print(f"\nMixing, {shards:,} shards of 1,000 samples, global batch {batch}:\n")
    print(
        "| lanes | pool | samples of one read | travel | shards in a batch | of a sample's batch "
        "from its own shard | stored neighbours that share a batch |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for lanes, pool in cases:
        order = sample_order.Order((1000,) * shards, batch, 0, lanes, pool)
        title = f"{lanes} | {pool:,} | {order.window_length}"
        rows.append((title, sample_order.mean_travel(order), order.epoch_ids(0)))
    # what no shuffle within bounded memory reaches
    shuffled = np.random.default_rng(0).permutation(shards * 1000)
    shuffled_TB = shuffled[: len(shuffled) // batch * batch].reshape(-1, batch)
    rows.append(("all shuffled | | ", 1.0, shuffled_TB))
    for title, travel, ids_TB in rows:
        mixing = measure_mixing(ids_TB, shards)
        print(
            f"| {title} | {travel:.2f} | {mixing.shards_in_batch:.0f} | {mixing.same_shard:.3%} "
            f"| {mixing.neighbours_together:.2%} |"
        )


def measure_mixing(ids_TB: NDArray[np.int64], shards: int) -> Mixing:
    """How well an epoch mixes a set of shards of 1,000 samples each."""
    batch = ids_TB.shape[1]
    counts_TS = np.stack([np.bincount(ids // 1000, minlength=shards) for ids in ids_TB])
    same_shard = (counts_TS * (counts_TS - 1)).sum(1).mean() / (batch * (batch - 1))
    batch_N = np.full(shards * 1000, -1)
    batch_N[ids_TB] = np.arange(len(ids_TB))[:, None]
    together_N = (batch_N[1:] == batch_N[:-1]) & (batch_N[1:] >= 0)
    return Mixing((counts_TS > 0).sum(1).mean(), same_shard, together_N.mean())
