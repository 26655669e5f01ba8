"""What a checkpoint costs the training: seconds that the step loop stands still, and slower steps.

    python -m mocov3_ds.bench checkpoint                       ViT-B, any machine
    torchrun --nproc-per-node 8 -m mocov3_ds.bench checkpoint --shape vit_l16 --precision bf16 \
        --batch 1024 --folder /shared/scratch                  on GPUs, to the disk that counts

The same state is saved in the foreground, in the background, and in the background with little
host memory for copies; after each save, steps are taken until it is on disk. Seconds are wall time.
The same bytes are also written by `write` and `fsync` alone, which says what the disk can do.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mocov3_ds.bench.random_network import RandomNetwork, start_network
from mocov3_ds.checkpoints.checkpoint_writer import NamedTensors, gather_tensor_files
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.vit import PAPER_SHAPES
from mocov3_ds.settings.wording import count_noun


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Time that checkpoints take from the training."""

    shape: Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"] = "vit_b16"
    """backbone of the paper"""
    batch: int = 8
    """global batch of the steps"""
    stage: int = 1
    """ZeRO stage"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the network"""
    repeats: int = 3
    """saves of each kind; the median counts"""
    every: int = 500
    """steps between two saves, for the share of time that saving costs"""
    folder: Path | None = None
    """folder on the disk to write to; empty = the system's for temporary files"""


@dataclass(frozen=True)
class Cost:
    """What one save costs, in seconds."""

    stall: float
    """time that the step loop stood still"""
    slowdown: float
    """time by which the steps during the writing took longer, summed"""
    on_disk: float
    """time from the start of the save to the end of the writing"""


def run_bench(options: CheckpointOptions) -> None:
    """Print the table."""
    measure_saves(EncoderShape(backbone=PAPER_SHAPES[options.shape]), options)


def measure_saves(shape: EncoderShape, options: CheckpointOptions) -> None:
    """Save in each way and print the table."""
    device = ranks.start()
    settings = {
        "zero_optimization": {"stage": options.stage},
        "bf16": {"enabled": options.precision == "bf16"},
    }
    network = start_network(shape, settings, batch=options.batch, device=device)

    def time_step() -> float:
        start = time.perf_counter()
        network.run_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as folder:
        run = Path(ranks.broadcast_object(folder))
        time_step()  # compiles, allocates
        step_s = statistics.median(time_step() for _ in range(options.repeats))
        size = sum(size for _, _, size in gather_tensor_files(saved_groups(network)))
        ways: dict[str, tuple[bool, float]] = {
            "foreground (`--save.background False`)": (False, 1e12),
            "background": (True, 1e12),
            "background, `--save.host_gb` a quarter of it": (True, size / 4),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for repeat in range(1, options.repeats + 1):
            for name, (background, host_bytes) in ways.items():
                saver = Saver(run, keep=1, host_bytes=int(host_bytes))
                groups = saved_groups(network)
                costs[name].append(
                    measure_save(saver, repeat, groups, time_step, step_s, background)
                )
        disk_s = time_plain_write(run, size)
        if ranks.is_first():
            print_table(options, device, costs, step_s, size, disk_s)


def saved_groups(network: RandomNetwork) -> dict[str, NamedTensors]:
    """The tensors of a checkpoint, by group and name."""

    def optimizer_state() -> Iterator[tuple[str, Tensor]]:
        for name, state in network.optimizer.full_state(*network.optimizer.moments):
            yield from ((f"{key}/{name}", tensor) for key, tensor in state.items())

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, state in network.optimizer.full_state("weight"):
            yield name, state["weight"]

    momentum = network.momentum_encoder.full_state()
    return {"base": weights(), "optimizer": optimizer_state(), "momentum": momentum}


def measure_save(
    saver: Saver,
    number: int,
    groups: dict[str, NamedTensors],
    time_step: Callable[[], float],
    step_s: float,
    background: bool,
) -> Cost:
    """Save once, and train until that is on disk; `step_s` is the time of a step beside no save."""
    start = time.perf_counter()
    stall = saver.save(number, groups, {}, background=background)
    slowdown = 0.0
    while ranks.broadcast_object(saver.is_busy()):
        slowdown += time_step() - step_s
    on_disk = time.perf_counter() - start
    saver.close()
    return Cost(stall, slowdown, on_disk)


def time_plain_write(run: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes on the first rank, 0 on the others."""
    if not ranks.is_first():
        return 0.0
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with (run / "plain").open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def print_table(
    options: CheckpointOptions,
    device: torch.device,
    costs: dict[str, list[Cost]],
    step_s: float,
    size: int,
    disk_s: float,
) -> None:
    """Print one row for each way of saving; for the first rank."""
    world = ranks.world_size()
    print(f"{options.shape} on {count_noun(world, 'rank')}, ZeRO-{options.stage}, ", end="")
    print(f"{options.precision}, {device}, torch {torch.__version__}; median of {options.repeats};")
    print(f"a step of {options.batch} images takes {step_s:.2f} s; the checkpoint's ", end="")
    print(f"{size / 1e9:.2f} GB take plain `write` and `fsync` {disk_s:.1f} s here\n")
    print("| save | step loop stands still, s | of a step | steps beside it slower by, s ", end="")
    print(f"| on disk after, s | MB/s | of {options.every} steps |\n|---|---|---|---|---|---|---|")
    for name, of_way in costs.items():
        stall, slowdown, on_disk = (
            statistics.median(getattr(cost, key) for cost in of_way)
            for key in ("stall", "slowdown", "on_disk")
        )
        share = (stall + max(slowdown, 0.0)) / (step_s * options.every)
        print(
            f"| {name} | {stall:.2f} | {100 * stall / step_s:.0f} % | {slowdown:.2f} "
            f"| {on_disk:.1f} | {size / 1e6 / on_disk:.0f} | {100 * share:.2f} % |"
        )
