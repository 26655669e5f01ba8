"""One step of a run, from the next batch to the moved weights; `train` logs it.

Shape suffixes: V = the two views, B = rank batch, C H W = image, M = branches with stochastic
depth, N = patches, K = patches that are kept, H = rows of this rank that are looked at.
"""

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.config.compression import StepLength
from mocov3_ds.data.loader import Batch
from mocov3_ds.distributed import heartbeat, ranks
from mocov3_ds.distributed.guarded_step import DROP
from mocov3_ds.model.chunking import shorter_chunks
from mocov3_ds.model.stochastic_depth import draw_factors, find_branches
from mocov3_ds.model.token_dropout import draw_patch_order, keep_first
from mocov3_ds.monitoring.profiler import StepPhase, phase
from mocov3_ds.training.compression import image_operations, length_of_step
from mocov3_ds.training.instruments import buffers_kept, random_numbers_kept
from mocov3_ds.training.measured_copy import FixedBatch
from mocov3_ds.training.run import Run
from mocov3_ds.training.run_data import network_views
from mocov3_ds.training.schedule import encoder_momentum, learning_rate, momentum_for_batch
from mocov3_ds.training.step import Draws, StepResult, make_both_keys, train_step


@dataclass(frozen=True)
class AdvancedStep:
    """What a step was made of, and what came of it."""

    batch: Batch
    x1_BCHW: Tensor
    """first views of this rank, as the network got them"""
    x2_BCHW: Tensor
    """second views of the same images"""
    lr: float
    momentum: float
    """momentum of the momentum encoder in this step"""
    result: StepResult
    length: StepLength | None = None
    """patches that took part, where the run compresses its sequences"""
    operations: float = 0.0
    """floating-point operations that the model asked for in the step, of all ranks together"""
    measured: dict[str, float] = field(default_factory=dict)
    """what the instruments say of the loss before the step, see `instruments`; empty in most"""
    look_s: float = 0.0
    """seconds that they took"""
    look_cpu_s: float = 0.0
    """CPU seconds that they took on this rank"""

    def measured_values(self) -> dict[str, Any]:
        """What the log says of the step; numbers that are not finite are left out."""
        result = self.result
        values: dict[str, Any] = {
            "loss": result.loss,
            "lr": self.lr,
            "momentum": self.momentum,
            "applied": result.applied,
            "data_wait_s": self.batch.wait_s,
        }
        if self.length is not None:
            values |= self.length.as_values() | {"operations": self.operations}
        values |= self.measured
        if result.bad_reason:
            values["trouble"] = result.bad_reason
        return {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }


def advance_run(run: Run, *, dropped: bool = False) -> AdvancedStep:
    """Data, schedules and the exact step; counts the step, unless it was bad.

    Args:
        run: the run, which is one step further afterwards; all ranks must call.
        dropped: whether to do everything but the update, as if the step had been bad.

    Raises:
        SystemExit: too many unreadable samples, or a store that cannot be read.
    """
    heartbeat.enter_stage(run.step + 1, "data")
    batch = next_batch(run)
    heartbeat.enter_stage(run.step + 1, "step")
    with phase(StepPhase.VIEWS):
        x1_BCHW, x2_BCHW = batch_views(run, batch)
    run.recorder.prepare_step(run.step)
    lr, momentum = scheduled_rates(run)
    run.optimizer.set_lr(lr)
    draws = draw_step(run, batch.sample_ids_B)
    started, cpu_started = time.perf_counter(), time.process_time()
    measured = measure_instruments(run, batch, (x1_BCHW, x2_BCHW), draws, lr)
    look_s, look_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    seed_drawing(run)
    result = train_step(
        run.engine,
        run.momentum_encoder,
        x1_BCHW,
        x2_BCHW,
        momentum=momentum,
        draws=draws,
        loss_limit=run.limits.loss_limit(),
        norm_limit=DROP if dropped else run.limits.norm_limit(),
        overlap_keys=run.config.overlap_keys,
    )
    operations = 0.0
    if draws.length is not None:
        operations = run.config.batch * image_operations(run.momentum_encoder.shape, draws.length)
    if not result.bad_reason:
        run.count_step()
        if result.applied:
            run.limits.note_applied_step(result.loss, result.gradient_norm)
    values = (result, draws.length, operations, measured, look_s, look_cpu_s)
    return AdvancedStep(batch, x1_BCHW, x2_BCHW, lr, momentum, *values)


def measure_instruments(
    run: Run, batch: Batch, views: tuple[Tensor, Tensor], draws: Draws, lr: float
) -> dict[str, float]:
    """What is due of curvature and noise before the coming step.

    Args:
        run: the run before that step, which stays as it is; all ranks must call.
        batch: this rank's part of the step's batch.
        views: both views of it (B, C, H, W), as the network gets them.
        draws: what of images and network takes part in the step.
        lr: learning rate of the step.
    """
    if not run.instruments.are_due(run.step + 1):
        return {}
    heartbeat.enter_stage(run.step + 1, "look")  # it has no limit
    run.instruments.prepare(run.model, _chunk_of_copy(run))
    fix = partial(_fix_batch, run, views, replace(draws, chunks=None))
    values = run.instruments.measure(run.step + 1, lr, run.optimizer, batch.sample_ids_B, fix)
    heartbeat.enter_stage(run.step + 1, "step")
    return values


def _fix_batch(
    run: Run, views: tuple[Tensor, Tensor], draws: Draws, rows_H: Tensor | None
) -> FixedBatch:
    """Some rows of each rank as a batch of their own, with the keys that they would get alone."""
    if rows_H is not None:
        views, draws = (views[0][rows_H], views[1][rows_H]), draws.of_rows(rows_H)
    encoder = run.momentum_encoder
    with random_numbers_kept(run.device), buffers_kept(encoder):
        seed_drawing(run)
        keys = make_both_keys(encoder, *views, run.model.chunks.size, draws)
    return FixedBatch((views[0].float(), views[1].float()), keys, draws, step_seed(run))


def _chunk_of_copy(run: Run) -> int:
    """Images of a pass in fp32, whose activations are twice as large where the run's are not."""
    chunk, autocast = run.model.chunks.size, run.engine.config.get("torch_autocast", {})
    is_fp32 = run.dtype == torch.float32 and not autocast.get("enabled")
    if is_fp32 or run.base.facts.rows_know_each_other:
        return chunk
    return math.ceil((chunk or run.config.batch // ranks.world_size()) / 2)


def next_batch(run: Run) -> Batch:
    """This rank's part of the next global batch; a rank reports the trouble with its own data.

    Raises:
        SystemExit: too many unreadable samples, or a store that cannot be read.
    """
    try:
        with phase(StepPhase.DATA):
            return next(run.loader)
    except (ValueError, OSError) as error:
        raise SystemExit(f"rank {ranks.rank()}, step {run.step + 1}: {error}") from None


def batch_views(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both views (B, C, H, W) of a batch on the run's device, in the network's dtype."""
    coloured = run.config.views.colour == "threads"
    return network_views(batch, run.view_spec, run.device, run.dtype, coloured=coloured)


def scheduled_rates(run: Run) -> tuple[float, float]:
    """Learning rate and encoder momentum of the coming step."""
    moco, (step, total) = run.config.moco, schedule_position(run)
    cosine = run.config.lr_schedule == "cosine"
    lr = learning_rate(
        step, peak=run.peak_rate, warmup_steps=run.warmup_steps, total_steps=total, cosine=cosine
    )
    cosine = moco.momentum_schedule == "cosine"
    momentum = encoder_momentum(step, start=moco.momentum, total_steps=total, cosine=cosine)
    momentum = momentum_for_batch(momentum, run.config.batch, moco.momentum_batch)
    return run.recorder.adjust_rate(run.step, lr), momentum


def schedule_position(run: Run) -> tuple[int, int]:
    """Steps done of the present schedules, and steps that they have."""
    begins = run.start.schedule_begins(run.config)
    return run.step - begins, run.total_steps - begins


def draw_step(run: Run, sample_ids_B: Tensor) -> Draws:
    """What of images and network takes part in the coming step.

    Args:
        run: the run before that step.
        sample_ids_B: numbers of this rank's samples in the manifest.
    """
    draws = Draws(factors_VBM=draw_depth(run, sample_ids_B))
    facts = run.base.facts
    length = length_of_step(run.config, facts, *schedule_position(run))
    if length is None:
        return draws
    queries_VBK, keys_VBK = draw_patches(run, sample_ids_B, length)
    return replace(
        draws,
        query_patches_VBK=queries_VBK,
        key_patches_VBK=keys_VBK,
        patch_scale=length.patch_scale,
        chunks=shorter_chunks(run.model.chunks, len(sample_ids_B), length.share_of(facts.patches)),
        length=length,
    )


def draw_patches(
    run: Run, sample_ids_B: Tensor, length: StepLength
) -> tuple[Tensor | None, Tensor | None]:
    """Patches that queries and keys keep in the coming step (V, B, K), each None where it is all.

    Args:
        run: the run before that step.
        sample_ids_B: numbers of this rank's samples in the manifest.
        length: how many patches take part.
    """
    counts = (length.query_patches, length.key_patches)
    if min(counts) == length.patches:
        return None, None
    order_VBN = draw_patch_order(
        length.patches, sample_ids_B.numpy(), seed=run.config.seed, step=run.step
    )
    queries, keys = (keep_first(order_VBN, count) for count in counts)
    return (
        None if queries is None else queries.to(run.device),
        None if keys is None else keys.to(run.device),
    )


def draw_depth(run: Run, sample_ids_B: Tensor) -> Tensor | None:
    """Draws of stochastic depth (V, B, M) in the coming step; None where the network has none.

    Args:
        run: the run before that step.
        sample_ids_B: numbers of this rank's samples in the manifest.
    """
    branches = find_branches(run.base.backbone)
    if not branches:
        return None
    factors_VBM = draw_factors(
        [branch.rate for branch in branches],
        sample_ids_B.numpy(),
        seed=run.config.seed,
        step=run.step,
    )
    return factors_VBM.to(run.device)


def seed_drawing(run: Run) -> None:
    """A loss that draws does it from the step's own seed: a resumed run repeats an unbroken one."""
    torch.manual_seed(step_seed(run))


def step_seed(run: Run) -> int:
    """Seed of what a loss draws in the coming step on this rank."""
    return hash((run.config.seed, run.step, ranks.rank())) % 2**63
