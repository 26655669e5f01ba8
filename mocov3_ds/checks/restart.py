"""Does a run that is stopped and started again do the same next steps, also at another ZeRO stage?

The run is tiny and real: drawn and sharded images, loader, engine, checkpoint folder, LAMB.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mocov3_ds.checks.equivalence import relative_difference
from mocov3_ds.checks.finding import Finding, judge_errors
from mocov3_ds.checks.run_disk import check_shared
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, release_engine
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run

_IMAGES, _ROWS, _STOP, _LAST = 96, 4, 2, 4
_REMEDY = (
    "a resumed run would not go on as it was: check that the run folder's disk passes above and "
    "that all ranks run the same versions."
)


@dataclass(frozen=True)
class Attempt:
    """What a run did between one start and the next stop."""

    first_step: int
    """steps that were done before the start"""
    losses: list[float]
    """loss of each step of the attempt"""
    weights: dict[str, Tensor]
    """base and momentum encoder at the end, fp32 on the CPU"""


def check_restart(
    device: torch.device, folder: Path, check_folder: Callable[[Path], Finding] = check_shared
) -> list[Finding]:
    """Save, load and continue a run, and compare it with one that was never stopped.

    Args:
        device: the device of this rank.
        folder: empty folder for the runs, the same on all ranks.
        check_folder: says whether this rank sees the folder of rank 0; a rank that does not would
            keep the others waiting.
    """
    if any(ranks.gather_objects(check_folder(folder).status == "fail")):
        reason = "not tried: a rank does not see the run folder"
        return [Finding("checkpoint: save and load", "skip", reason)]
    shards = ranks.run_on_first(partial(_make_sharded_images, folder))
    attempt = partial(_run_attempt, device, folder, shards)
    unbroken = attempt("unbroken", stage=1, until=_LAST, save=False)
    attempt("broken", stage=1, until=_STOP, save=True)
    resumed = attempt("broken", stage=1, until=_LAST, save=False)
    at_stage_3 = attempt("broken", stage=3, until=_LAST, save=False)
    loaded = resumed.first_step == at_stage_3.first_step == _STOP
    findings = [
        Finding(
            "checkpoint: save and load",
            "pass" if loaded else "fail",
            f"continued at step {resumed.first_step} (ZeRO-1), {at_stage_3.first_step} (ZeRO-3)",
            f"step {_STOP}",
            "" if loaded else _REMEDY,
        )
    ]
    for name, continued, limit in (
        ("resume, same stage", resumed, 0.0 if device.type == "cpu" else 1e-4),
        ("resume, ZeRO-1 to ZeRO-3", at_stage_3, 1e-4),
    ):
        errors = {
            "losses": _loss_error(continued.losses, unbroken.losses[-len(continued.losses) :]),
            "weights": max(
                _weight_error(continued.weights[name], tensor)
                for name, tensor in unbroken.weights.items()
            ),
        }
        expected = "bit-equal to an unbroken run" if limit == 0 else ""
        findings.append(judge_errors(name, errors, limit, _REMEDY, expected=expected))
    return findings


def _make_sharded_images(folder: Path) -> str:
    from data_prep.drawn_samples import draw_split
    from data_prep.shard import make_shards
    from data_prep.shard_options import ShardOptions
    from data_prep.sources import list_images

    images, shards = folder / "images", str(folder / "shards")
    draw_split(images, 7, _IMAGES)
    make_shards(
        list_images(str(images)), shards, ShardOptions(shard_size="32"), workers=1, quiet=True
    )
    return shards


def _run_attempt(
    device: torch.device,
    folder: Path,
    shards: str,
    name: str,
    *,
    stage: int,
    until: int,
    save: bool,
) -> Attempt:
    """Start or continue the run `name` and do its steps up to step `until`."""
    batch = _ROWS * ranks.world_size()
    flags = {
        "data.shards": shards,
        "runs": folder,
        "name": name,
        "batch": batch,
        "epochs": 100,
        "warmup_epochs": 0,
        "views.image_size": 16,
        "model.dim": 24,
        "model.depth": 1,
        "model.heads": 2,
        "model.hidden": 32,
        "model.out": 16,
        "data.threads": 1,
        "data.lanes": ranks.world_size(),
        "knn.probes": 0,
        "chunk": batch,
    }
    overrides = [f"zero_optimization.stage={stage}", "optimizer.type=Lamb"]
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    arguments += [word for override in overrides for word in ("--ds", override)]
    run = build_run(parse(arguments), device)
    try:
        first_step = run.step
        losses = [advance_run(run).result.loss for _ in range(first_step, until)]
        if save:
            run.save_checkpoint(last=True)
        weights = {f"base.{n}": t.cpu() for n, t in full_tensors(run.engine.module.base)}
        weights |= {f"momentum.{n}": t.cpu().clone() for n, t in run.momentum_encoder.full_state()}
        return Attempt(first_step, losses, weights)
    finally:
        run.close()
        release_engine(run.engine)
        gc.collect()


def _loss_error(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two losses of the same step."""
    return max(relative_difference(a, b) for a, b in zip(losses, expected, strict=True))


def _weight_error(tensor: Tensor, expected: Tensor) -> float:
    """Relative difference of a tensor; one of nearly nothing but noise counts as of norm 1."""
    expected = expected.double()
    return float((tensor.double() - expected).norm() / expected.norm().clamp_min(1.0))
