"""The instruments in runs: what they leave alone, ZeRO stages, numbers of ranks, a resume."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds import train
from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.config.parts import SignalConfig
from mocov3_ds.monitoring.signal_file import INSTRUMENTS, read_signals
from mocov3_ds.recipes import parse
from mocov3_ds.training.instruments import check_instruments
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, rows_of

FLAGS = [
    *(*SMALL, "--epochs", "1", "--warmup_epochs", "0", "--log", "csv", "--chunk", "3"),
    *("--signals.attention_every", "0", "--model.drop_path", "0.3", "--moco.momentum", "0.9"),
]
MEASURED = ["--signals.sharpness_every", "1", "--signals.noise_every", "2"]


def train_each(folder: str, attempts: dict[str, list[str]]) -> None:
    os.chdir(folder)
    warnings.filterwarnings("ignore")
    for name, further_flags in attempts.items():
        flags = [*FLAGS, "--data.shards", "train", *further_flags, "--name", name.rstrip("_")]
        train.train(parse(flags))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs of three steps, on one rank and on two."""
    folder = tmp_path_factory.mktemp("runs")
    make_set(str(folder / "train"), [20, 7, 23])
    on_one = {
        "plain": [],
        "measured": MEASURED,
        "broken": [*MEASURED, "--stop_after_steps", "2"],
        "broken_": MEASURED,
    }
    stages = [[*MEASURED, "--ds", f"zero_optimization.stage={n}"] for n in (0, 3)]
    run_ranks(1, train_each, str(folder), on_one, timeout=600)
    on_two = {"stage0": stages[0], "stage3": stages[1]}
    run_ranks(2, train_each, str(folder), on_two, timeout=600)
    return folder / "runs"


def tensors(run: Path) -> dict[str, Any]:
    saved = checkpoint.Checkpoint(checkpoint.checkpoint_folder(run, 3))
    groups = ("base", "momentum", "optimizer")
    return {f"{g}/{n}": saved.read_tensor(g, n) for g in groups for n in saved.tensor_names(g)}


@pytest.mark.slow
def test_a_measured_run_is_the_run(runs: Path) -> None:
    plain = tensors(runs / "plain")
    assert any("running_mean" in name for name in plain)
    for name in ("measured", "broken"):
        measured = tensors(runs / name)
        assert {*measured} == {*plain}
        assert [n for n, tensor in plain.items() if not tensor.equal(measured[n])] == []
    losses = [[row.get("loss") for row in rows_of(runs / n)] for n in ("plain", "measured")]
    assert losses[0] == losses[1]
    assert not {*INSTRUMENTS} & {name for row in rows_of(runs / "plain") for name in row}


@pytest.mark.slow
def test_values_are_in_both_files_when_due(runs: Path) -> None:
    table = read_signals(runs / "measured")
    rows = {row["step"]: row for row in rows_of(runs / "measured")}
    assert table.measured("sharpness")[0].tolist() == [2, 3]  # Adam has no P before
    assert table.measured("noise_trace")[0].tolist() == [2]
    for name in INSTRUMENTS:
        for step, value in zip(*table.measured(name), strict=True):
            assert rows[int(step)][name] == pytest.approx(float(value), rel=1e-6)
    for step in (2, 3):
        row = rows[step]
        assert row["sharpness_limit"] == pytest.approx(38 / row["lr"], rel=1e-6)
        assert row["curvature_limit"] == pytest.approx(2 / row["lr"], rel=1e-6)
        assert row["sharpness"] > max(0, row["curvature"])


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(runs: Path) -> None:
    broken, unbroken = (read_signals(runs / name) for name in ("broken", "measured"))
    for name in INSTRUMENTS:
        np.testing.assert_array_equal(broken.scalar(name), unbroken.scalar(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage0", "stage3"])
def test_two_ranks_at_any_stage_measure_the_same(runs: Path, name: str) -> None:
    found, expected = read_signals(runs / name), read_signals(runs / "measured")
    for column in ("sharpness", "curvature", "noise_trace", "gradient_square"):
        # rounding of the step before: 4e-5 at most where this was written
        value, expected_value = (table.measured(column)[1][0] for table in (found, expected))
        assert value == pytest.approx(expected_value, rel=1e-3)


def test_a_batch_that_has_no_halves() -> None:
    check_instruments(SignalConfig(noise_every=5), 4, 2)
    check_instruments(SignalConfig(sharpness_every=5), 3, 1)
    for batch, world_size in ((6, 2), (2, 1)):
        with pytest.raises(ValueError, match=rf"there are {batch // world_size} on each of"):
            check_instruments(SignalConfig(noise_every=5), batch, world_size)
