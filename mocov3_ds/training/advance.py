"""One step of a run, from the next batch to the moved weights; `train` logs it, `replay` looks on.

Shape suffixes: B = rank batch, C H W = image.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.data.loader import Batch
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.distributed.guarded_step import DROP
from mocov3_ds.monitoring.profiler import phase
from mocov3_ds.training.run import Run
from mocov3_ds.training.schedule import encoder_momentum, learning_rate
from mocov3_ds.training.step import StepResult, train_step


@dataclass(frozen=True)
class Advance:
    """What a step was made of, and what came of it."""

    batch: Batch
    x1_BCHW: Tensor
    x2_BCHW: Tensor
    lr: float
    momentum: float
    result: StepResult

    def measured(self) -> dict[str, Any]:
        """What the log says of the step; numbers that are not finite are left out."""
        result = self.result
        measured: dict[str, Any] = {
            "loss": result.loss,
            "lr": self.lr,
            "momentum": self.momentum,
            "applied": result.applied,
            "data_wait_s": self.batch.wait_s,
        }
        if result.trouble:
            measured["trouble"] = result.trouble
        return {
            name: value
            for name, value in measured.items()
            if not isinstance(value, float) or math.isfinite(value)
        }


def advance(job: Run, *, dropped: bool = False) -> Advance:
    """Data, schedules and the exact step; counts the step, unless it met trouble.

    Args:
        job: the run.
        dropped: do everything but the update, as if the step had met trouble.

    Raises:
        SystemExit: too many unreadable samples, or a store that cannot be read.
    """
    heartbeat.at(job.step + 1, "data")
    batch = next_batch(job)
    heartbeat.at(job.step + 1, "step")
    with phase("views"):
        x1_BCHW, x2_BCHW = job.views(batch)
    lr, momentum = rates(job)
    job.optimizer.set_lr(lr)
    seed_step(job)
    result = train_step(
        job.engine,
        job.momentum_encoder,
        x1_BCHW,
        x2_BCHW,
        momentum=momentum,
        loss_limit=job.guard.loss_limit(),
        norm_limit=DROP if dropped else job.guard.norm_limit(),
    )
    if not result.trouble:
        job.count_step()
        if result.applied:
            job.guard.passed(result.loss, result.gradient_norm)
    return Advance(batch, x1_BCHW, x2_BCHW, lr, momentum, result)


def rates(job: Run) -> tuple[float, float]:
    """Learning rate and encoder momentum of the coming step."""
    config = job.config
    lr = learning_rate(
        job.step,
        peak=job.peak_rate,
        warmup_steps=job.warmup_steps,
        total_steps=job.total_steps,
        cosine=config.lr_schedule == "cosine",
    )
    momentum = encoder_momentum(
        job.step,
        start=config.moco.momentum,
        total_steps=job.total_steps,
        cosine=config.moco.momentum_schedule == "cosine",
    )
    return job.watch.begin(job.step, lr), momentum


def seed_step(job: Run) -> None:
    """Stochastic depth draws from the step's own seed: a resumed run repeats an unbroken one."""
    torch.manual_seed(hash((job.config.seed, job.step, ranks.rank())) % 2**63)


def next_batch(job: Run) -> Batch:
    """This rank's part of the next global batch; trouble with the data is this rank's own to say.

    Raises:
        SystemExit: too many unreadable samples, or a store that cannot be read.
    """
    try:
        with phase("data"):
            return next(job.stream)
    except (ValueError, OSError) as error:
        raise SystemExit(f"rank {ranks.rank()}, step {job.step + 1}: {error}") from None
