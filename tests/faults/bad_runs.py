"""Runs of two ranks that meet a bad sample: stopped, skipped, rewound, replayed."""

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocov3_ds import train
from mocov3_ds.data.loader import Batch
from mocov3_ds.distributed import heartbeat
from mocov3_ds.faults.replay import replay_step
from mocov3_ds.training import advance
from mocov3_ds.training.run import Run
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL

POISON = 40  # this sample's first view is not finite: steps 6, 8, 10
# all that is drawn for a step or kept beside the weights; whole sequences from step 6 on
DRAWS = [
    *("--model.patch_size", "4", "--compress", "0:0.5 0.4:1", "--model.drop_path", "0.2"),
    *("--model.sigma_reparam", "--model.layer_scale", "0.1"),
    *("--ds", 'optimizer.clip={"type": "adagc", "warmup_steps": 3}'),
]
_batch_views = advance.batch_views


def poisoned_views(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    x1_BCHW, x2_BCHW = _batch_views(run, batch)
    if run.config.name.startswith("doubted"):  # step 6 is bad until the run comes from before 4
        if run.step == 5 and run.limits.returned_to != 2:
            x1_BCHW.fill_(3e38)  # too large for the patch projection
        return x1_BCHW, x2_BCHW
    x1_BCHW[batch.sample_ids_B == POISON, 1, 2, 3] = torch.nan
    return x1_BCHW, x2_BCHW


def run_commands(folder: str, command_lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and output of the real entry point; `replay RUN STEP` is the other one."""
    os.chdir(folder)
    advance.batch_views = poisoned_views
    outcomes = []
    for command_line in command_lines:
        if command_line[0] == "replay":
            lines = replay_step(Path(command_line[1]), int(command_line[2]))
            outcomes.append((0, "\n".join(lines)))
            continue
        output = io.StringIO()
        sys.argv = ["train.py", *command_line]
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            status = train.main()
            heartbeat.stop()
        outcomes.append((status, output.getvalue()))
    return outcomes


@dataclass(frozen=True)
class BadRuns:
    """What came of all runs."""

    folder: Path
    """where their run folders lie"""
    step: int
    """the first bad step"""
    outcomes: dict[str, tuple[int, str]]
    """case -> exit status and output"""

    def record(self) -> dict[str, Any]:
        """The record of the run that was stopped."""
        path = self.folder / f"stopped/trouble/step-{self.step:08d}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content


def make_runs(folder: Path) -> BadRuns:
    """Do all runs, in two starts of two ranks."""
    make_set(str(folder / "train"), [20, 7, 23])
    common = [*SMALL, *DRAWS, "--data.shards", "train", "--knn.probes", "0", "--epochs", "4"]

    def line(name: str, *flags: str) -> list[str]:
        return [*common, "--name", name, *flags]

    skip, rewind = ("--trouble.policy", "skip"), ("--trouble.policy", "rewind")
    stop = run_ranks(2, run_commands, str(folder), [line("stopped")], timeout=600)[0][0]
    (record,) = (folder / "runs/stopped/trouble").glob("*.json")
    step = json.loads(record.read_text())["step"]
    cases = {
        "replay": ["replay", "runs/stopped", str(step)],
        "skip after stop": line("stopped", *skip),
        "skip": line("skipped", *skip),
        "skip, first part": line("halves", *skip, "--stop_after_steps", "7"),
        "skip, second part": line("halves", *skip),
        "too many": line("many", *skip, "--trouble.limit", "1"),
        "rewind": line("rewound", *rewind),
        "rewind, first part": line("again", *rewind, "--stop_after_steps", "9"),
        "rewind, second part": line("again", *rewind),
        "rewind twice": line("doubted", *rewind),
        "rewind twice, first part": line("doubted too", *rewind, "--stop_after_steps", "7"),
        "rewind twice, second part": line("doubted too", *rewind),
    }
    outcomes = run_ranks(2, run_commands, str(folder), [*cases.values()], timeout=600)[0]
    named = {"stop": stop, **dict(zip(cases, outcomes, strict=True))}
    return BadRuns(folder / "runs", step, named)
