"""What does an index of 10^8 samples cost each rank? Memory, time to open it, first batch.

The set is made up: all shards are links to one tar, so that 10^8 samples take the 3.2 GB of their
index alone. Its order, its reads and its batches are those of any other set. Memory is what the
kernel counts after some batches: resident pages (RSS), the same with pages of N processes counted
1/N (PSS), and what cannot be dropped, as no file has it (anonymous).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mocov3_ds.bench.storage import write_set
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.manifest import Shard
from mocov3_ds.distributed.ranks import free_port

_RANK = """
import importlib, json, sys, time
from pathlib import Path
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks

url, batch, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ranks.start()


def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return [1024 * kilobytes[name] for name in ("Rss", "Pss", "Anonymous")]


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


before, peak_before = memory(), peak()
ranks.barrier()
start = time.perf_counter()
try:
    load = importlib.import_module("mocov3_ds.data.shared_set").load_on_ranks
except ModuleNotFoundError:  # the code as it was
    load = manifests.load
manifest = load(url)
manifest.digest, manifest.has_labels  # a run asks for both
opened = time.perf_counter()
loader = Loader(manifest, LoaderSettings(
    views=ViewSpec(), image_size=32, global_batch=batch, rank=ranks.rank(),
    world_size=ranks.world_size(), seed=0, threads=1, readers=2,
))
first_ids = next(loader).sample_ids_B[:4].tolist()
first = time.perf_counter()
for _ in range(batches):
    next(loader)
ranks.barrier()
after = memory()
print(json.dumps({
    "open_s": opened - start, "first_batch_s": first - opened, "ids": first_ids,
    "peak": peak() - peak_before,
    **{name: b - a for name, a, b in zip(("rss", "pss", "anonymous"), before, after)},
}))
ranks.barrier()
loader.close()
"""


@dataclass(frozen=True, kw_only=True)
class IndexBench:
    """What is measured."""

    samples: int = 10**8
    """samples of the made-up set, whole shards of 10,000"""
    ranks: int = 2
    """processes that open it at the same time"""
    batch: int = 1024
    """global batch"""
    batches: int = 20
    """batches after the first, before memory is read"""
    folder: Path | None = None
    """folder for the set, which is removed at the end; None = one for temporary files"""
    code: Path = Path(__file__).parents[2]
    """checkout whose code opens it, to compare two"""


def run_bench(options: IndexBench) -> None:
    """Make the set, open it on all ranks, print a row for each."""
    with tempfile.TemporaryDirectory(prefix="mocov3-bench-index-", dir=options.folder) as folder:
        url = str(Path(folder) / "set")
        make_set(url, options.samples, per_shard=10_000)
        rows = measure_ranks(url, options)
    print(f"| {options.samples:.0e} samples | open | first batch | peak | RSS | PSS | anonymous |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rank, row in enumerate(rows):
        sizes = (f"{row[name] / 1e6:.0f} MB" for name in ("peak", "rss", "pss", "anonymous"))
        times = f"{row['open_s']:.1f} s | {row['first_batch_s']:.1f} s"
        print(f"| rank {rank} | {times} | {' | '.join(sizes)} |")
    print(f"\nfirst ids of each rank: {[row['ids'] for row in rows]}")


def make_set(url: str, samples: int, per_shard: int) -> None:
    """Write a set of whole shards that are links to one tar.

    Args:
        url: Folder of the set, on this machine.
        samples: Number of samples; what is left over of a shard is dropped.
        per_shard: Samples of each shard.
    """
    images = []
    for number in range(100):
        pixels_HW3 = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        with tempfile.TemporaryFile() as file:
            Image.fromarray(pixels_HW3).save(file, "JPEG", quality=50)
            file.seek(0)
            images.append(file.read())
    one = write_set(url, [images[n % 100] for n in range(per_shard)], per_shard)
    tar, count = Path(url, one.shards[0].name), samples // per_shard
    shards = []
    for number in range(count):
        name = f"made-up-{number:07d}.tar"
        Path(url, name).hardlink_to(tar)
        shards.append(Shard(name, one.shards[0].bytes, per_shard, f"{number:064x}"))
    manifests.write(url, shards, np.tile(one.index_N, count))


def measure_ranks(url: str, options: IndexBench) -> list[dict[str, float]]:
    """Open a set on all ranks at the same time; returns what each measured, without its imports."""
    port, processes = str(free_port()), []
    for rank in range(options.ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": str(options.code),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        arguments = [url, str(options.batch), str(options.batches)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _RANK, *arguments],
                env={**os.environ, **variables},
                cwd=options.code,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    rows = []
    for process in processes:
        printed, _ = process.communicate()
        if process.returncode:
            raise ValueError(f"a rank ended with status {process.returncode}; see above.")
        rows.append(json.loads(printed.splitlines()[-1]))
    return rows
