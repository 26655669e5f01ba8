"""Small checkpoints for the tests of this folder, written by what a run calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.saver import Saver

WEIGHT = torch.arange(6.0).reshape(2, 3)


def save_step(
    run: Path, step: int, keep: int = 2, keep_every: int = 0, state: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint whose one weight tells its step, and return its folder."""
    groups = {"base": [("w", WEIGHT + step)], "optimizer": [("exp_avg/w", WEIGHT)]}
    saver = Saver(run, keep=keep, keep_every=keep_every)
    saver.save(step, groups, state or {"optimizer_steps": step}, background=False)
    return checkpoint.checkpoint_folder(run, step)


def file_names(run: Path) -> list[str]:
    """Names of what lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def steps_on_disk(run: Path) -> list[int]:
    """Steps of all checkpoints of a run, oldest first."""
    return [checkpoint.step_in_name(folder) for folder in checkpoint.list_checkpoints(run)]


def check_newest(run: Path, steps: set[int]) -> int:
    """Step of the newest undamaged checkpoint, after a look at its content and at `latest`."""
    newest = checkpoint.find_newest(run)
    assert newest is not None
    assert newest.step in steps
    assert torch.equal(newest.read_tensor("base", "w"), WEIGHT + newest.step)
    pointer = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    checkpoint.Checkpoint(pointer).verify()
    return newest.step
