"""Rates of this machine: measured, written, and what a plan for this machine is made with."""

import json
import math
from functools import partial
from pathlib import Path

import pytest

from mocov3_ds.planning import command
from mocov3_ds.planning.calibrate import calibrate
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.measured_card import read_rates
from mocov3_ds.planning.options import rank_options
from tests.planning.test_command import call

quick = partial(calibrate, seconds=0.0, images=2, tokens=16)


def test_rates_are_positive_and_written(tmp_path: Path) -> None:
    path = tmp_path / "folder/rates.json"
    rates = quick(path)
    assert json.loads(path.read_text()) == rates
    for name, rate in rates.items():
        if name.endswith("_per_s"):
            assert isinstance(rate, float) and rate > 0 and math.isfinite(rate), name


def test_calibration_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "calibrate", quick)
    rates = tmp_path / "rates.json"
    assert call(monkeypatch, "--calibrate", rates) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(rates.read_text())
    flags = ["--gpus", "1xcpu", "--rates", rates, "--recipe", "tiny", "--json"]
    assert call(monkeypatch, *flags) == 0
    best = json.loads(capsys.readouterr().out)["options"][0]
    expected = json.loads(rates.read_text())
    cluster = Cluster(read_rates(rates), 1, 1)
    assert cluster.card.fp32_rate == expected["fp32_operations_per_s"]
    pace = rank_options(command.plan_run("tiny"), cluster)[0].pace
    assert pace is not None
    assert best["step_s"] == pytest.approx(pace.step_s)
