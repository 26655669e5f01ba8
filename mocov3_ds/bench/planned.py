"""Planned against measured: memory and time of a rank's share of large plans, on this machine.

    python -m mocov3_ds.bench planned
    python -m mocov3_ds.bench planned --cells vit_b16:4096:64:8:0

A cell stands for one rank of a plan: RECIPE:BATCH:RANKS:CHUNK:KEPT. The rank runs alone on its part
of the images (BATCH / RANKS), in fp32 on the CPU; the plan is made for the same: a rank of one,
fp32, the machine's rates as `mocov3 plan --calibrate` measures them. Each figure comes from a
process of its own:

- tensors: bytes that torch's allocator has handed out at once at most, from the first weight to the
  end of the second step, which is what fills a card;
- resident: what the resident set grows by over that of a process that has made a step of a tiny
  network. Memory that is handed out and never written does not count here, and freed activations
  go back to the system at once (glibc would keep them for later);
- time: CPU seconds of one thread, median of the steps after the first, with the C library as it is.
"""

import gc
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from mocov3_ds.config import encoder_shape
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, start_engine
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape
from mocov3_ds.optim import AdamW
from mocov3_ds.planning.calibrate import calibrate
from mocov3_ds.planning.hardware import read_cluster, read_rates
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.pace import plan_pace
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.recipes import RECIPES
from mocov3_ds.training.step import QueriesToLoss, train_step

_GIB = 2**30
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Memory and time of one rank's share of large plans, planned and measured."""

    cells: tuple[str, ...] = (
        "vit_s16:4096:512:2:0",
        "vit_s16:4096:512:0:0",
        "vit_b16:4096:1024:2:0",
    )
    """RECIPE:BATCH:RANKS:CHUNK:KEPT; chunk 0 = each view in one pass"""
    rates: Path | None = None
    """what `mocov3 plan --calibrate` wrote; empty = measure now"""


@dataclass(frozen=True)
class Cell:
    """One rank of a plan."""

    recipe: str
    batch: int
    ranks: int
    chunks: Chunks

    @property
    def images(self) -> int:
        """Of a rank."""
        return self.batch // self.ranks


def read_cell(text: str) -> Cell:
    """A cell from RECIPE:BATCH:RANKS:CHUNK:KEPT.

    Raises:
        ValueError: not of that form.
    """
    try:
        recipe, *numbers = text.split(":")
        batch, count, chunk, kept = (int(number) for number in numbers)
        assert recipe in RECIPES and batch % count == 0
    except (ValueError, AssertionError):
        raise ValueError(
            f"{text!r} is not RECIPE:BATCH:RANKS:CHUNK:KEPT, e.g. vit_b16:512:64:4:0."
        ) from None
    return Cell(recipe, batch, count, Chunks(size=chunk, keep=kept))


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.rates or Path(folder) / "rates.json"
        if options.rates is None:
            calibrate(path)
        cluster = read_cluster("1xcpu", presets=read_rates(path))
        print(json.dumps(json.loads(path.read_text())))
    print("\n| a rank of | images | passes | GiB of tensors planned | measured | ", end="")
    print("| GiB resident planned | measured | | s planned | measured | |")
    print("|---" * 12 + "|")
    for cell in map(read_cell, options.cells):
        speed = plan_pace(step_setup(cell), cluster)
        found = (
            (planned_bytes(cell, on_demand=False) / _GIB, in_own_process(_tensors, cell) / _GIB),
            (planned_bytes(cell, on_demand=True) / _GIB, in_own_process(_resident, cell) / _GIB),
            (speed.step_s, in_own_process(_seconds, cell)),
        )
        passes = f"chunks of {cell.chunks.size}" if cell.chunks.size else "one pass"
        print(f"| {cell.recipe}, {cell.batch} on {cell.ranks} | {cell.images} | {passes} ", end="")
        for plan, real in found:
            print(f"| {plan:.2f} | {real:.2f} | {plan / real - 1:+.1%} ", end="")
        print("|", flush=True)


def planned_bytes(cell: Cell, *, on_demand: bool) -> float:
    """Of a cell, without the bytes that views are made of, which are not in these processes."""
    setup = step_setup(cell)
    plan = plan_memory(setup, on_demand=on_demand)
    return plan.peak_bytes - 2 * cell.images * 3 * setup.shape.vit.image_size**2


def step_setup(cell: Cell) -> StepSetup:
    """A step of a cell as the planner sees it: a rank alone, in fp32."""
    return StepSetup(
        shape=encoder_shape(RECIPES[cell.recipe].config),
        stage=1,
        world_size=1,
        batch=cell.images,
        precision="fp32",
        chunks=cell.chunks,
    )


def in_own_process(measure: Callable[[Cell], float], cell: Cell) -> float:
    """What `measure` finds in a fresh process."""
    if measure is _resident:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    else:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(measure, (cell,)))


def _step_of(shape: EncoderShape, images: int, chunks: Chunks) -> Callable[[], Any]:
    """A step of a new engine."""
    torch.set_num_threads(1)
    ranks.start()
    config = engine_config({}, global_batch=images, world_size=1)
    model = QueriesToLoss(BaseEncoder(shape), ContrastiveLoss(0.2), chunks=chunks)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    engine = start_engine(model, AdamW(named, lr=1e-4), config)
    encoder = MomentumEncoder(shape)
    encoder.start_from(dict(full_tensors(engine.module.base)))
    encoder.follow(engine.module.base)
    size = shape.vit.image_size
    x1, x2 = (torch.randn(images, 3, size, size) for _ in range(2))
    return partial(train_step, engine, encoder, x1, x2, momentum=0.99)


def _of(cell: Cell) -> Callable[[], Any]:
    return _step_of(encoder_shape(RECIPES[cell.recipe].config), cell.images, cell.chunks)


def _tensors(cell: Cell) -> float:
    def two_steps() -> None:
        step = _of(cell)
        step()
        step()

    return peak_of_tensors(two_steps)


def peak_of_tensors(work: Callable[[], Any]) -> float:
    """Most bytes that tensors made in `work` hold at once.

    A tensor that another thread is the last to let go of is counted to the end.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    # negative where memory is given back
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now, peak = 0, 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return float(peak)


def _resident(cell: Cell) -> float:
    tiny = VitShape(image_size=32, patch_size=8, dim=48, depth=2, heads=4)
    # what a process loads once: code, DeepSpeed's tables, compiled kernels
    _step_of(EncoderShape(vit=tiny, hidden=64, out=32), 2, cell.chunks)()
    gc.collect()
    before = psutil.Process().memory_info().rss
    step = _of(cell)
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - float(before)


def _seconds(cell: Cell) -> float:
    step = _of(cell)
    step()
    took = []
    for _ in range(_STEPS):
        begin = time.process_time()
        step()
        took.append(time.process_time() - begin)
    return statistics.median(took)


def command() -> Any:
    """Entry of `python -m mocov3_ds.bench planned`."""
    return main(tyro.cli(Options, prog="python -m mocov3_ds.bench planned"))
