"""What a checkpoint costs the training: seconds that the step loop stands still, and slower steps.

    python -m mocov3_ds.bench checkpoint                       ViT-B, any machine
    torchrun --nproc-per-node 8 -m mocov3_ds.bench checkpoint --shape vit_l16 --precision bf16 \
        --batch 1024 --folder /shared/scratch                  on GPUs, to the disk that counts

The same state is saved in the foreground, in the background, and in the background with little
host memory for copies; after each save the steps go on until it is on disk. Seconds are the wall's.
The same bytes written and waited for by nothing but `write` and `fsync` say what the disk can do.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint_writer
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, start_engine
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES
from mocov3_ds.optim import AdamW
from mocov3_ds.training.step import QueriesToLoss, train_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time that checkpoints take from the training."""

    shape: Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"] = "vit_b16"
    """backbone of the paper"""
    batch: int = 8
    """global batch of the steps"""
    stage: int = 1
    """ZeRO stage"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network"""
    repeats: int = 3
    """saves of each kind; the median counts"""
    every: int = 500
    """steps between two saves, for the share of the time that they cost"""
    folder: Path | None = None
    """on the disk to write to; empty = the system's for temporary files"""


@dataclass(frozen=True)
class Cost:
    """Of one save, in seconds."""

    stall: float
    """the step loop stood still"""
    slower: float
    """the steps beside the writing took longer than others, all together"""
    on_disk: float
    """from asking to the end of the writing"""


def main(options: Options) -> None:
    """Print the table."""
    device = ranks.start()
    step, groups = prepare(options, device)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as made:
        run = Path(ranks.broadcast_object(made))
        step()  # compiles, allocates
        alone = statistics.median(step() for _ in range(options.repeats))
        size = sum(size for _, _, size in checkpoint_writer.gather_tensor_files(groups()))
        ways: dict[str, tuple[bool, float]] = {
            "foreground (`--save.background False`)": (False, 1e12),
            "background": (True, 1e12),
            "background, `--save.host_gb` a quarter of it": (True, size / 4),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for count in range(options.repeats):
            for name, (background, room) in ways.items():
                saver = Saver(run, keep=1, host_bytes=int(room))
                found = cost(saver, count + 1, groups, step, alone, background=background)
                costs[name].append(found)
        disk_s = plain_write(run, size)
        if ranks.is_first():
            print_table(options, device, costs, alone, size, disk_s)


def cost(
    saver: Saver,
    number: int,
    groups: Callable[[], dict[str, checkpoint_writer.NamedTensors]],
    step: Callable[[], float],
    alone: float,
    *,
    background: bool,
) -> Cost:
    """Save once, and train until that is on disk."""
    started = time.perf_counter()
    stall = saver.save(number, groups(), {}, background=background)
    slower = 0.0
    while ranks.broadcast_object(saver.busy()):
        slower += step() - alone
    on_disk = time.perf_counter() - started
    saver.close()
    return Cost(stall, slower, on_disk)


def plain_write(run: Path, size: int) -> float:
    """Seconds to write and sync as many bytes, on the first rank."""
    if not ranks.is_first():
        return 0.0
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with (run / "plain").open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def print_table(
    options: Options,
    device: torch.device,
    costs: dict[str, list[Cost]],
    alone: float,
    size: int,
    disk_s: float,
) -> None:
    """On the first rank."""
    world = ranks.world_size()
    print(f"{options.shape} on {world} rank{'s' * (world > 1)}, ZeRO-{options.stage}, ", end="")
    print(f"{options.precision}, {device}, torch {torch.__version__}; median of {options.repeats};")
    print(f"a step of {options.batch} images takes {alone:.2f} s; the checkpoint's ", end="")
    print(f"{size / 1e9:.2f} GB take plain `write` and `fsync` {disk_s:.1f} s here\n")
    print("| save | step loop stands still, s | of a step | steps beside it slower by, s ", end="")
    print(f"| on disk after, s | MB/s | of {options.every} steps |\n|---|---|---|---|---|---|---|")
    for name, of_way in costs.items():
        stall, slower, on_disk = (
            statistics.median(getattr(cost, what) for cost in of_way)
            for what in ("stall", "slower", "on_disk")
        )
        share = (stall + max(slower, 0.0)) / (alone * options.every)
        print(
            f"| {name} | {stall:.2f} | {100 * stall / alone:.0f} % | {slower:.2f} | {on_disk:.1f} "
            f"| {size / 1e6 / on_disk:.0f} | {100 * share:.2f} % |"
        )


def prepare(
    options: Options, device: torch.device
) -> tuple[Callable[[], float], Callable[[], dict[str, checkpoint_writer.NamedTensors]]]:
    """A step that returns its seconds, and what a run saves."""
    shape = EncoderShape(vit=PAPER_SHAPES[options.shape])
    given: dict[str, Any] = {"zero_optimization": {"stage": options.stage}}
    given["bf16"] = {"enabled": options.precision == "bf16"}
    config = engine_config(given, global_batch=options.batch, world_size=ranks.world_size())
    dtype = compute_dtype(config)
    torch.manual_seed(0)
    model = QueriesToLoss(BaseEncoder(shape), temperature=0.2)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.0)
    engine = start_engine(model.to(device), optimizer, config)
    encoder = MomentumEncoder(shape, device=device, dtype=dtype)
    encoder.start_from(dict(full_tensors(engine.module.base)))
    encoder.follow(engine.module.base)
    size = shape.vit.image_size
    x1_BCHW, x2_BCHW = (
        torch.randn(options.batch // ranks.world_size(), 3, size, size, device=device, dtype=dtype)
        for _ in range(2)
    )

    def step() -> float:
        started = time.perf_counter()
        train_step(engine, encoder, x1_BCHW, x2_BCHW, momentum=0.99)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def moments() -> Iterator[tuple[str, Tensor]]:
        for name, state in optimizer.full_state(*optimizer.moments):
            yield from ((f"{key}/{name}", tensor) for key, tensor in state.items())

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, state in optimizer.full_state("weight"):
            yield name, state["weight"]

    def groups() -> dict[str, checkpoint_writer.NamedTensors]:
        return {"base": weights(), "optimizer": moments(), "momentum": encoder.full_state()}

    return step, groups


def command() -> None:
    """Entry of `python -m mocov3_ds.bench checkpoint`."""
    main(tyro.cli(Options, prog="python -m mocov3_ds.bench checkpoint"))
