"""The benchmark of the signals prints its table; what it toggles is what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mocov3_ds.bench import signals
from mocov3_ds.training.advance import AdvancedStep
from mocov3_ds.training.run import Run
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks

SMALL = "--batch 8 --views.image_size 16 --model.dim 24 --model.depth 1 --model.heads 2"
SMALL += " --model.hidden 16 --model.out 8 --data.lanes 4"


def few_steps(shards: str) -> tuple[int, int]:
    flags = [*SMALL.split(), "--data.shards", shards]
    times = signals.time_whole_steps(flags, blocks=2, steps=2)
    return len(times.without), len(times.with_signals)


def few_looks(shards: str) -> dict[str, list[str]]:
    """Names of the values that a step with each instrument has logged."""
    logged: list[set[str]] = []
    record_step = signals.record_step

    def step(run: Run) -> tuple[float, float]:
        entries: dict[str, Any] = {}
        advance, record = signals.advance_run, run.recorder.record

        def advance_and_tell(run: Run) -> AdvancedStep:
            advanced = advance(run)
            entries.update(advanced.measured)
            return advanced

        def record_and_tell(*args: Any, **kwargs: Any) -> dict[str, Any]:
            entries.update(recorded := record(*args, **kwargs))
            return recorded

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signals, "advance_run", advance_and_tell)
            patch.setattr(run.recorder, "record", record_and_tell)
            seconds = record_step(run)
        layers = {name.partition("/")[2] for name in run.recorder.layer_values}
        logged.append({*entries} | layers)
        return seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "record_step", step)
        steps, looks = signals.time_instruments([*SMALL.split(), "--data.shards", shards], turns=1)
    assert len(steps) == len(signals.INSTRUMENTS)
    assert {len(looks[name]) for name in looks if name != signals.LAYERS} == {1}
    names = map(sorted, logged[len(steps) :])
    return dict(zip(signals.INSTRUMENTS, names, strict=True))


def test_each_instrument_looks_alone(tmp_path: Path) -> None:
    make_set(str(tmp_path), [20, 7, 23])
    (logged,) = run_ranks(1, few_looks, str(tmp_path), timeout=300)
    of_instrument = {
        name: {"grad_linf", "spread", "block_rms", "noise_scale", "sharpness"} & {*values}
        for name, values in logged.items()
    }
    assert of_instrument == {
        signals.LAYERS: {"grad_linf"},
        "spread of queries and keys": {"spread"},
        "attention per head, activations of blocks": {"block_rms"},
        "gradient noise scale": {"noise_scale"},
        "sharpness and curvature": {"sharpness"},
    }


def test_how_often_a_look_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    looks = {name: [0.0001, 0.0001, 9.0] for name in signals.INSTRUMENTS}
    looks["sharpness and curvature"] = [1.0, 1.0, 0.0]
    looks["attention per head, activations of blocks"] = [0.05, 0.05, 0.05]
    signals.print_instruments([0.12, 0.09, 0.1], looks)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one look beside a step of 100 ms (90 to 120), medians of 3 and more"
    rows = {row[0]: row[2:] for row in (line.strip("| ").split(" | ") for line in lines[5:])}
    assert rows["sharpness and curvature"] == ["1000.0", "10.000", "off", "-", "1000"]
    blocks = rows["attention per head, activations of blocks"]
    assert blocks == ["50.0", "0.500", "50", "1.0 %", "50"]
    assert rows["gradient noise scale"] == ["0.1", "0.001", "off", "-", "1"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = {"blocks.0.weight": (8, 8), "blocks.0.bias": (8,)}
    for kind in signals.KINDS:
        signals.print_row(kind, signals.time_optimizer(small, kind, rounds=2))
    signals.print_row("parts", signals.time_parts(rounds=2))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["AdamW", "AdamW, update_clip", "Lamb", "Lars", "parts"]
    for _, without, with_signals, ratio, added in rows:
        assert min(float(without), float(with_signals)) >= 0
        assert float(ratio) > 0
        assert added[0] in "+-"


def test_a_command_of_one_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    signals.run_bench(signals.SignalOptions(shapes=(), rounds=1, blocks=0, turns=0))
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| tiny recipe: optimizer, row, alarms | ")
    with pytest.raises(ValueError, match="--rounds and --steps must be at least 1"):
        signals.run_bench(signals.SignalOptions(rounds=0))
    with pytest.raises(ValueError, match="--turns must be 0, or at least 2"):
        signals.run_bench(signals.SignalOptions(turns=1))


def test_half_of_the_steps_are_measured(tmp_path: Path) -> None:
    make_set(str(tmp_path), [20, 7, 23])
    assert run_ranks(1, few_steps, str(tmp_path), timeout=300) == [(2, 2)]
