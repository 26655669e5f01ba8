"""A tiny run is stopped, saved and continued: the same next steps, also on another ZeRO stage.

The run is real: drawn and sharded images, stream, engine, checkpoint folder, LAMB.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mocov3_ds.checks.finding import Finding, judged
from mocov3_ds.checks.machine import check_shared
from mocov3_ds.config import parse
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors
from mocov3_ds.training.advance import advance
from mocov3_ds.training.run import build_job

_IMAGES, _ROWS, _STOP, _LAST = 96, 4, 2, 4
_REMEDY = (
    "a resumed run would not go on as it was: check that the run folder's disk passes above and "
    "that all ranks run the same versions."
)


@dataclass(frozen=True)
class Sitting:
    """What a run did between its start and its end or stop."""

    losses: list[float]
    began: int
    """steps done when it started"""
    weights: dict[str, Tensor]
    """base and momentum encoder, fp32 on the CPU"""


def check_resume(device: torch.device, folder: Path) -> list[Finding]:
    """Save, load, continue; a rank that does not see `folder` would keep the others waiting."""
    if any(ranks.gather_objects(check_shared(folder).status == "fail")):
        why = "not tried: a rank does not see the run folder"
        return [Finding("checkpoint: save and load", "skip", why)]
    shards = ranks.first_does(partial(_sharded_images, folder))
    sit = partial(_sitting, device, folder, shards)
    unbroken = sit("unbroken", stage=1, until=_LAST, save=False)
    sit("broken", stage=1, until=_STOP, save=True)
    again = sit("broken", stage=1, until=_LAST, save=False)
    changed = sit("broken", stage=3, until=_LAST, save=False)
    started = again.began == changed.began == _STOP
    exact = device.type == "cpu"
    findings = [
        Finding(
            "checkpoint: save and load",
            "pass" if started else "fail",
            f"continued at step {again.began} (ZeRO-1), {changed.began} (ZeRO-3)",
            f"step {_STOP}",
            "" if started else _REMEDY,
        )
    ]
    for name, other, limit in (
        ("resume, same stage", again, 0.0 if exact else 1e-4),
        ("resume, ZeRO-1 to ZeRO-3", changed, 1e-4),
    ):
        errors = {
            "losses": _largest(other.losses, unbroken.losses[-len(other.losses) :]),
            "weights": max(_difference(other.weights[n], w) for n, w in unbroken.weights.items()),
        }
        wanted = "bit-equal to an unbroken run" if limit == 0 else ""
        findings.append(judged(name, errors, limit, _REMEDY, wanted=wanted))
    return findings


def _sharded_images(folder: Path) -> str:
    from data_prep.samples import draw_split
    from data_prep.shard import Options, shard
    from data_prep.sources import open_source

    images, shards = folder / "images", str(folder / "shards")
    draw_split(images, 7, _IMAGES)
    shard(open_source(str(images)), shards, Options(shard_size="32"), workers=1, quiet=True)
    return shards


def _sitting(
    device: torch.device,
    folder: Path,
    shards: str,
    name: str,
    *,
    stage: int,
    until: int,
    save: bool,
) -> Sitting:
    """Start or continue the run `name` and do its steps up to `until`."""
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
    settings = [f"zero_optimization.stage={stage}", "optimizer.type=Lamb"]
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    arguments += [part for setting in settings for part in ("--ds", setting)]
    job = build_job(parse(arguments), device)
    try:
        began = job.step
        losses = [advance(job).result.loss for _ in range(began, until)]
        if save:
            job.save(last=True)
        weights = {f"base.{n}": t.cpu() for n, t in full_tensors(job.engine.module.base)}
        weights |= {f"momentum.{n}": t.cpu().clone() for n, t in job.momentum_encoder.full_state()}
        return Sitting(losses, began, weights)
    finally:
        job.close()
        job.engine.destroy()
        gc.collect()


def _largest(ours: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, wanted, strict=True))


def _difference(ours: Tensor, wanted: Tensor) -> float:
    """Relative, of the whole tensor; a tensor of noise counts as one of norm 1."""
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1.0))
