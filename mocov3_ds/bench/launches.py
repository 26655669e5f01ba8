"""Launches, waits, copied bytes and memory of a training step, counted on a GPU that is not there.

    python -m mocov3_ds.bench launches
    python -m mocov3_ds.bench launches --shapes vit_s16 --worlds 1 --stages 1 --places

The trainer runs on `tests/fake_gpu`, whose kernels do nothing: torch's dispatcher, its allocator,
NCCL's process group and DeepSpeed are the real ones. So what is launched, copied, waited for and
reserved is that of a real card of this size, and no number here is a time. Several ranks are rank 0
alone, with all that it sends and reserves. Counted is the third step, from its start to the start
of the next one; convolutions count as one launch. It needs a checkout of the repository, a C++
compiler and a torch for CUDA.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

_ROOT = Path(__file__).resolve().parents[2]
_STEPS = 3
"""steps of a run; the last one is counted: the first two fill caches and tables"""
_BATCHES = {"vit_s16": 512, "vit_b16": 256, "vit_l16": 512, "vit_h14": 256}
"""images of a rank's batch"""
_COLUMNS = {
    "views": ("views",),
    "queries": ("queries",),
    "keys": ("keys",),
    "momentum": ("momentum encoder",),
    "loss": ("loss",),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
}
"""columns of the table, with the beginnings of the profile's rows that they join"""


@dataclass(frozen=True, kw_only=True)
class LaunchesOptions:
    """Launches, waits, bytes and memory of a step."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = (
        *("vit_s16", "vit_b16", "vit_l16", "vit_h14"),
    )
    """recipes"""
    worlds: tuple[int, ...] = (1, 8)
    """numbers of ranks"""
    stages: tuple[int, ...] = (1, 3)
    """ZeRO stages"""
    batch: int = 0
    """images of a rank's batch; 0 = 512 for S and L, 256 for B and H"""
    memory_gb: float = 79.1
    """memory of the card, GiB"""
    capability: str = "9.0"
    """compute capability of the card"""
    flags: tuple[str, ...] = ()
    """further flags of the trainer, such as --flags=--recompute_blocks"""
    places: bool = False
    """list where the host waits"""


def run_bench(options: LaunchesOptions) -> None:
    """Print the table, row by row."""
    if not (_ROOT / "tests" / "fake_gpu").is_dir():
        raise ValueError("the fake GPU is part of the repository (tests/fake_gpu): run it there.")
    print(f"a card of {options.memory_gb} GiB, compute capability {options.capability}, bf16\n")
    columns = ("network", "a rank", "ranks", "ZeRO", "chunk", "launches", *_COLUMNS, "rest")
    columns += ("waits", "MB to it", "MB within", "allocated", "reserved, GiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="launches-") as folder:
        images = max(_rank_batch(s, options) for s in options.shapes) * max(options.worlds)
        draw_images(Path(folder) / "images", images)
        for case in product(options.shapes, options.worlds, options.stages):
            print_row(*case, options, Path(folder))


def _rank_batch(shape: str, options: LaunchesOptions) -> int:
    return options.batch or _BATCHES[shape]


def draw_images(folder: Path, count: int) -> None:
    """Write small JPEG files of noise.

    Args:
        folder: New folder that gets them.
        count: Number of images to draw.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg")


def print_row(shape: str, world: int, stage: int, options: LaunchesOptions, folder: Path) -> None:
    """Count one case and print its row, and the places of its waits where they are asked for."""
    batch = _rank_batch(shape, options)
    step, output = count_step(shape, batch, world, stage, options, folder)
    chunk = re.search(r"chunks of (\d+)", output)
    parts: Counter[str] = Counter()
    for title, launches in step["phases"].items():
        names = [name for name, starts in _COLUMNS.items() if title.startswith(starts)]
        parts[names[0] if names else "rest"] += launches
    cells = [shape, batch, world, stage, chunk[1] if chunk else "all", sum(parts.values())]
    cells += [parts[name] for name in (*_COLUMNS, "rest")]
    cells += [step["syncs"], f"{step['to_device_bytes'] / 1e6:.1f}"]
    cells += [f"{step['within_bytes'] / 1e6:.0f}"]
    cells += [f"{step['allocated_gb']:.2f}", f"{step['reserved_gb']:.2f}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for waiting, count in step["places"].items() if options.places else ():
        print(f"    {count} x {waiting}", flush=True)


def count_step(
    shape: str, batch: int, world: int, stage: int, options: LaunchesOptions, folder: Path
) -> tuple[dict[str, Any], str]:
    """What the counted step did, and what its run said.

    Args:
        shape: Recipe of the run.
        batch: Images of a rank's batch.
        world: Number of ranks of the pretended world.
        stage: ZeRO stage, 0 to 3.
        options: Card, and further flags.
        folder: Holds the images, and gets shards and runs.

    Raises:
        ValueError: The run failed; with what it said last.
    """
    name = f"{shape}-{world}-{stage}"
    result = folder / f"{name}.json"
    command = [sys.executable, "-m", "tests.fake_gpu", "--world", str(world)]
    command += ["--memory_gb", str(options.memory_gb), "--capability", options.capability]
    command += ["--unsaved", "--json", str(result), "--", "--recipe", shape, "--name", name]
    command += ["--runs", str(folder / "runs"), "--data.images", str(folder / "images")]
    command += ["--batch", str(batch * world), "--stop_after_steps", str(_STEPS)]
    command += ["--knn.probes", "0", "--ds", f"zero_optimization.stage={stage}", *options.flags]
    process = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=1900, check=False
    )
    if not result.is_file():
        raise ValueError(f"{name}: {(process.stdout + process.stderr).strip()[-2000:]}")
    counted = json.loads(result.read_text())
    if counted["status"]:
        raise ValueError(f"{name}: {counted['output'].strip()[-2000:]}")
    steps: list[dict[str, Any]] = counted["steps"]
    return steps[-1], str(counted["output"])
