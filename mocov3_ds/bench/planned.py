"""Planned against measured: memory and time of a rank's share of large plans, on this machine.

    python -m mocov3_ds.bench planned
    python -m mocov3_ds.bench planned --cells vit_b16:4096:64:8:0

A cell stands for one rank of a plan: RECIPE:BATCH:RANKS:CHUNK:KEPT. The rank runs alone on its
share of the images (BATCH / RANKS), in fp32 on the CPU. The plan is made for the same: one rank,
fp32, the machine's rates as `mocov3 plan --calibrate` measures them. Each number comes from a
separate process:

- tensors: the most bytes that torch's allocator has handed out at once, from the first weight to
  the end of the second step; they are what fills a card;
- resident: growth of the resident set over that of a process that has made a step of a tiny
  network. Memory that is handed out and never written does not count, and freed activations go back
  to the system at once (glibc would keep them for later);
- time: CPU seconds of one thread, median of the steps after the first, with the C library as it is.
"""

import gc
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mocov3_ds.bench.random_network import RandomNetwork, start_network
from mocov3_ds.bench.resource_use import peak_resident_bytes, resident_bytes, time_call
from mocov3_ds.config.run_config import encoder_shape
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.vit import VitShape
from mocov3_ds.planning.calibrate import calibrate
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.measured_card import read_rates
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.pace import plan_pace
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.recipes import RECIPES

_GIB = 2**30
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class PlannedOptions:
    """Memory and time of one rank's share of large plans, planned and measured."""

    cells: tuple[str, ...] = (
        "vit_s16:4096:512:2:0",
        "vit_s16:4096:512:0:0",
        "vit_b16:4096:1024:2:0",
    )
    """RECIPE:BATCH:RANKS:CHUNK:KEPT; chunk 0 = each view in one pass"""
    rates: Path | None = None
    """file that `mocov3 plan --calibrate` wrote; empty = measure now"""


@dataclass(frozen=True)
class Cell:
    """One rank of a plan."""

    recipe: str
    batch: int
    ranks: int
    chunks: Chunks
    """how the rank's images go through the backbone"""

    @property
    def images(self) -> int:
        """Number of images of the rank."""
        return self.batch // self.ranks

    @property
    def shape(self) -> EncoderShape:
        """Architecture of the recipe's encoders."""
        return encoder_shape(RECIPES[self.recipe].config)


def read_cell(text: str) -> Cell:
    """A cell from RECIPE:BATCH:RANKS:CHUNK:KEPT.

    Raises:
        ValueError: the text is not of that form.
    """
    try:
        recipe, *numbers = text.split(":")
        batch, count, chunk, keep = (int(number) for number in numbers)
        assert recipe in RECIPES and batch % count == 0
    except (ValueError, AssertionError):
        raise ValueError(
            f"{text!r} is not RECIPE:BATCH:RANKS:CHUNK:KEPT, e.g. vit_b16:512:64:4:0."
        ) from None
    return Cell(recipe, batch, count, Chunks(size=chunk, keep=keep))


def run_bench(options: PlannedOptions) -> None:
    """Print the table."""
    cells = [read_cell(text) for text in options.cells]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.rates or Path(folder) / "rates.json"
        if options.rates is None:
            calibrate(path)
        cluster = Cluster(read_rates(path), 1, 1)
        print(json.dumps(json.loads(path.read_text())))
    print("\n| a rank of | images | passes | GiB of tensors planned | measured | ", end="")
    print("| GiB resident planned | measured | | s planned | measured | |")
    print("|---" * 12 + "|")
    for cell in cells:
        pairs = (
            (planned_gib(cell, on_demand=False), measure_in_process(_tensor_gib, cell)),
            (planned_gib(cell, on_demand=True), measure_in_process(_resident_gib, cell)),
            (plan_pace(step_setup(cell), cluster).step_s, measure_in_process(_step_seconds, cell)),
        )
        passes = f"chunks of {cell.chunks.size}" if cell.chunks.size else "one pass"
        print(f"| {cell.recipe}, {cell.batch} on {cell.ranks} | {cell.images} | {passes} ", end="")
        for planned, measured in pairs:
            print(f"| {planned:.2f} | {measured:.2f} | {planned / measured - 1:+.1%} ", end="")
        print("|", flush=True)


# -------------------------------------------------------------------------------------------- plans


def planned_gib(cell: Cell, *, on_demand: bool) -> float:
    """Planned memory of a cell, without the uint8 crops, which these processes do not have.

    With `on_demand`, memory counts when it is first written, as on a CPU.
    """
    setup = step_setup(cell)
    plan = plan_memory(setup, on_demand=on_demand)
    return (plan.peak_bytes - 2 * cell.images * 3 * setup.shape.vit.image_size**2) / _GIB


def step_setup(cell: Cell) -> StepSetup:
    """A step of a cell as the planner sees it: one rank, in fp32."""
    return StepSetup(
        shape=cell.shape,
        stage=1,
        world_size=1,
        batch=cell.images,
        precision="fp32",
        chunks=cell.chunks,
    )


# ------------------------------------------------------------------------------------- measurements


def measure_in_process(measure: Callable[[Cell], float], cell: Cell) -> float:
    """What `measure` returns in a new process."""
    if measure is _resident_gib:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    else:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(measure, (cell,)))


def _start_network(shape: EncoderShape, images: int, chunks: Chunks) -> RandomNetwork:
    torch.set_num_threads(1)
    device = ranks.start()
    return start_network(shape, {}, batch=images, device=device, lr=1e-4, chunks=chunks)


def _tensor_gib(cell: Cell) -> float:
    def run_two_steps() -> None:
        network = _start_network(cell.shape, cell.images, cell.chunks)
        network.run_step()
        network.run_step()

    return peak_tensor_bytes(run_two_steps) / _GIB


def peak_tensor_bytes(work: Callable[[], object]) -> float:
    """Most bytes that the tensors made in `work` hold at once.

    A tensor that another thread releases last is counted until the end.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    # negative where memory is given back
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated, peak = 0, 0
    for _, size in changes:
        allocated += size
        peak = max(peak, allocated)
    return float(peak)


def _resident_gib(cell: Cell) -> float:
    tiny = VitShape(image_size=32, patch_size=8, dim=48, depth=2, heads=4)
    # what a process loads once: code, DeepSpeed's tables, compiled kernels
    _start_network(EncoderShape(backbone=tiny, hidden=64, out=32), 2, cell.chunks).run_step()
    gc.collect()
    start = resident_bytes()
    network = _start_network(cell.shape, cell.images, cell.chunks)
    network.run_step()
    network.run_step()
    return (peak_resident_bytes() - start) / _GIB


def _step_seconds(cell: Cell) -> float:
    network = _start_network(cell.shape, cell.images, cell.chunks)
    network.run_step()
    device = ranks.this_device()
    return statistics.median(time_call(network.run_step, device) for _ in range(_STEPS))
