"""Phases of a step: their own times, the rows they go to, and a profile of real ranks."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

from mocov3_ds.bench.step import StepOptions, Variant, build_steps
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.vit import VitShape
from mocov3_ds.monitoring import profiler
from mocov3_ds.monitoring.profiler import (
    TABLE_ROWS,
    PhaseClock,
    Profile,
    StepPhase,
    phase,
    running_clock,
)
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, TRAIN, start


def test_an_inner_phase_is_not_counted_for_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PhaseClock(torch.device("cpu"))
    marks = iter([0, 1, 3, 6, 10, 15, 21, 28, 28])
    weight = torch.zeros((), requires_grad=True)
    output = 2 * weight
    profiler.replace_phase_in_backward(output, StepPhase.BACKWARD_OF_BACKBONES)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(marks) * 10**9)
    with running_clock(clock), phase(StepPhase.STEP):  # from 0 to the second 28
        with phase(StepPhase.BACKWARD):  # from 1 to 15
            with phase(StepPhase.BACKBONE):  # from 3 to 6
                pass
            output.backward()  # at 10
        with pytest.raises(ZeroDivisionError), phase(StepPhase.LOSS):  # from 21 to 28
            raise ZeroDivisionError
    seconds = clock.seconds()
    assert seconds == {
        (StepPhase.STEP,): 1 + 6,
        (StepPhase.STEP, StepPhase.BACKWARD): 2 + 4,
        (StepPhase.STEP, StepPhase.BACKWARD, StepPhase.BACKBONE): 3,
        (StepPhase.STEP, StepPhase.BACKWARD_OF_BACKBONES): 5,
        (StepPhase.STEP, StepPhase.LOSS): 7,
    }
    assert sum(seconds.values()) == 28


def test_a_path_goes_to_the_first_row_that_fits() -> None:
    rows = profiler.sum_rows(
        {
            (StepPhase.STEP, StepPhase.BACKBONE): 1.0,
            (
                StepPhase.STEP,
                StepPhase.BACKWARD,
                StepPhase.BACKWARD_OF_BACKBONES,
                StepPhase.BACKBONE,
            ): 2.0,
            (
                StepPhase.STEP,
                StepPhase.BACKWARD,
                StepPhase.BACKWARD_OF_BACKBONES,
                StepPhase.COLLECTIVE,
            ): 4.0,
            (StepPhase.STEP, StepPhase.HEADS, StepPhase.COLLECTIVE): 8.0,
            (StepPhase.STEP, StepPhase.OPTIMIZER, StepPhase.COLLECTIVE): 16.0,
        }
    )
    assert list(rows.values()) == [1, 2, 4, 8, 16]
    assert [name.partition(":")[0] for name in rows] == [
        *("queries", "backward", "reduction of the gradients, backward of batch norm over ranks"),
        *("batch norm, keys and loss of the other ranks", "optimizer"),
    ]
    for anything in StepPhase:
        assert sum(profiler.sum_rows({(StepPhase.STEP, anything): 1.0}).values()) == 1.0


def test_the_table_adds_up_over_ranks() -> None:
    text = profiler.format_table(
        [{"loss": 1.0, "optimizer": 1.0}, {"loss": 3.0, "optimizer": 3.0}], 5
    )
    assert "4.000 s a step, mean of 5 steps after 2, 2 ranks" in text
    assert text.splitlines()[-2:] == [
        "| loss | 2.0000 | 50.0 % | 3.0000 |",
        "| optimizer | 2.0000 | 50.0 % | 3.0000 |",
    ]


def profiled(folder: Path) -> list[str]:
    """Three profiles on each rank: of two steps, of steps that never come, and of none."""
    vit = VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3)
    shape, options = EncoderShape(backbone=vit, hidden=32, out=16), StepOptions(batch=8)
    variant = Variant("chunks", Chunks(size=2))
    step = build_steps(shape, options, [variant], torch.device("cpu"))[variant]
    said: list[str] = []
    for steps, until in ((2, 5), (50, 4), (0, 3)):
        profile = Profile(folder / str(steps), steps, torch.device("cpu"), said.append)
        for _ in range(until):
            with profile.step():
                step()
        profile.close()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as trace, phase(StepPhase.STEP):
        pass
    assert "step" not in [event.name for event in trace.events()]  # no profile is being taken
    return said


def test_a_profile_of_two_ranks_has_every_phase(tmp_path: Path) -> None:
    said = run_ranks(2, partial(profiled, tmp_path))
    text, why_not = said[0]
    assert why_not == "no profile: --profile 50 takes 52 steps and the run had 4 to do"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("table.md", "trace-rank0.json", "trace-rank1.json")
    ]
    written = (tmp_path / "2" / "profile" / "table.md").read_text()
    assert text.startswith(written.rstrip())
    parts = [line.split(" | ")[0].removeprefix("| ") for line in written.splitlines()[4:]]
    absent = (StepPhase.DATA, StepPhase.VIEWS)
    expected = dict.fromkeys(row.title for row in TABLE_ROWS if row.phase not in absent)
    assert parts == [*expected]
    seconds = [float(line.split(" | ")[1]) for line in written.splitlines()[4:]]
    assert sum(seconds) == pytest.approx(float(written.split(": ")[1].split()[0]), abs=2e-3)
    for rank in range(2):
        trace = json.loads((tmp_path / "2" / "profile" / f"trace-rank{rank}.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert names.count("step") == 2
        # two steps: two chunks of each view forward, and all but the last one again
        assert names.count("backbone") == 2 * (4 + 3)
        assert {"heads", "keys", "momentum", "loss", "optimizer", "collective"} <= {*names}


def test_the_flag_writes_the_table_of_a_run(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [40])
    run = start(
        [
            *(sys.executable, TRAIN, *SMALL, "--data.shards", str(tmp_path / "train")),
            *("--profile", "2", "--stop_after_steps", "4", "--runs", str(tmp_path / "runs")),
        ],
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "| wait for data | 0." in run.stderr + run.stdout
    names = {path.name for path in (tmp_path / "runs" / "tiny" / "profile").iterdir()}
    assert names == {"table.md", "trace-rank0.json"}
