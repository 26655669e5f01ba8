"""The benchmark of the signals prints its table; what it toggles is what it says."""

from pathlib import Path

import pytest
import torch

from mocov3_ds.bench import signals
from mocov3_ds.training.advance import advance_run
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
    logged: dict[str, list[str]] = {}

    def step(run: Run) -> None:
        advanced = advance_run(run)
        values = {"step": run.step, **advanced.measured_values()}
        values |= run.recorder.record(
            run.step,
            values,
            sample_ids_B=advanced.batch.sample_ids_B,
            x1_BCHW=advanced.x1_BCHW,
            pair=advanced.result.pair,
            backbone=run.base.backbone,
        )
        layers = [name.partition("/")[2] for name in run.recorder.layer_values]
        logged[str(len(logged))] = sorted({*advanced.measured, *values, *layers})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "record_step", step)
        seconds = signals.time_instruments([*SMALL.split(), "--data.shards", shards], turns=1)
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys(seconds, 1)
    return dict(zip(signals.INSTRUMENTS, [*logged.values()][len(seconds) :], strict=True))


def test_each_instrument_looks_alone(tmp_path: Path) -> None:
    make_set(str(tmp_path), [20, 7, 23])
    (logged,) = run_ranks(1, few_looks, str(tmp_path), timeout=300)
    of_instrument = {
        name: {"grad_linf", "spread", "block_rms", "noise_scale", "sharpness"} & {*values}
        for name, values in logged.items()
    }
    assert of_instrument == {
        "nothing": set(),
        "gradients, updates, g / sqrt(v) of all layers": {"grad_linf"},
        "spread of queries and keys": {"spread"},
        "attention per head, activations of blocks": {"block_rms"},
        "gradient noise scale": {"noise_scale"},
        "sharpness and curvature": {"sharpness"},
    }


def test_how_often_a_look_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {name: [0.1, 0.1, 9.0] for name in signals.INSTRUMENTS}
    seconds["nothing"] = [0.12, 0.09, 0.1]
    seconds["sharpness and curvature"] = [1.1, 1.1, 0.0]
    seconds["attention per head, activations of blocks"] = [0.15, 0.15, 0.15]
    signals.print_instruments(seconds)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one look beside a step of 100 ms (90 to 120), medians of 3"
    rows = {row[0]: row[2:] for row in (line.strip("| ").split(" | ") for line in lines[5:])}
    assert rows["sharpness and curvature"] == ["1000.0", "10.00", "off", "-", "1000"]
    assert rows["attention per head, activations of blocks"] == [
        "50.0",
        "0.50",
        "50",
        "1.0 %",
        "50",
    ]
    assert rows["gradient noise scale"] == ["0.0", "0.00", "off", "-", "1"]


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
