"""Files of measured rates: whose card they describe, what is refused, and what steps tell of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.shapes import PAPER_SHAPES
from mocov3_ds.planning.cards import PRESETS
from mocov3_ds.planning.measured_card import (
    REPORT_SCHEMA,
    describe_gpu,
    fit_reach,
    is_gpu_file,
    plan_step,
    read_rates,
)
from mocov3_ds.planning.step_setup import StepSetup
from tests.planning.test_command import call

RATES = {
    "machine": "NVIDIA H200",
    "memory_bytes": 150e9,
    "fp32_operations_per_s": 50e12,
    "bf16_operations_per_s": 700e12,
    "attention_operations_per_s": 300e12,
    "elementwise_bytes_per_s": 2.0e12,
    "copy_bytes_per_s": 4.0e12,
}
REPORT: dict[str, Any] = {
    "program": "mocov3 gpu",
    "schema": REPORT_SCHEMA,
    "void": False,
    "rates": RATES,
    "reach": {"products": 0.52, "spread": 1.2},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(REPORT | changes))
    return path


def step(recipe: str, chunk: int, batch: int = 128) -> StepSetup:
    return StepSetup(
        shape=EncoderShape(backbone=PAPER_SHAPES[recipe]),
        stage=1,
        world_size=1,
        batch=batch,
        precision="bf16",
        chunks=Chunks(size=chunk),
    )


def test_a_file_without_rates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for text in ("", "[]", '{"memory_bytes": 1}', '{"program": "mocov3 gpu", "schema": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"holds no rates|is no file of measured rates"):
            read_rates(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 99}, "has schema 99, and this program reads 1"),
        ({"void": True}, "is void: it was made on a device that computes nothing"),
        ({"rates": None}, "holds no rates"),
        ({"rates": RATES | {"copy_bytes_per_s": "fast"}}, "is no file of measured rates"),
    ],
)
def test_a_report_that_says_nothing_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        read_rates(written(tmp_path, **changes))


def test_a_report_describes_its_card(tmp_path: Path) -> None:
    card = read_rates(written(tmp_path))
    assert card.name == "H200"
    assert (card.reach.products, card.reach.spread) == (0.52, 1.2)
    assert card.elementwise_bandwidth == 2.0e12 and card.bandwidth == 5.0e12
    assert card.low_precision_rate == PRESETS["H200"].low_precision_rate  # MFU is of the data sheet
    unfitted = read_rates(written(tmp_path, reach=None))
    assert unfitted.reach.products == pytest.approx(700 / 989.4)
    unknown = read_rates(written(tmp_path, rates=RATES | {"machine": "NVIDIA GB900 (x)"}))
    assert unknown.name == "GB900-x-measured" and unknown.reach.products == 0.52
    assert unknown.low_precision_rate == pytest.approx(700e12)


def test_the_planner_takes_a_report_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    assert is_gpu_file(path) and not is_gpu_file(tmp_path / "none.json")
    plans = []
    for flag in ("--rates", "--calibrate"):
        assert call(monkeypatch, "--gpus", "8xH200", flag, path, "--json") == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert call(monkeypatch, "--gpus", "8xH200", "--json") == 0
    by_preset = json.loads(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert plans[0]["options"][0]["step_s"] != by_preset["options"][0]["step_s"]
    assert json.loads(path.read_text()) == REPORT  # it is read, not written anew
    assert call(monkeypatch, "--gpus", "8xA100", "--rates", path) == 2
    assert "measured of one H200; plan with --gpus 1xH200" in capsys.readouterr().err


def test_the_reach_is_what_the_measured_steps_had() -> None:
    card = describe_gpu(RATES)
    real = replace(card, reach=replace(card.reach, products=0.41))
    steps = [(setup, plan_step(real, setup)) for setup in (step("vit_s16", 16), step("vit_l16", 0))]
    products, spread = fit_reach(card, steps)
    assert products == pytest.approx(0.41)
    assert spread == 1.05
    slower = [(steps[0][0], 2 * steps[0][1]), steps[1]]
    products, spread = fit_reach(card, slower)
    assert products < 0.41 and 1.2 < spread < 2
    assert fit_reach(card, [(steps[0][0], 1e-6)]) == (card.reach.products, math.inf)
