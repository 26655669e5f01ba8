"""What is timed on a GPU has its numbers, and the planner is held against them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mocov3_ds.bench.gpu import speeds
from mocov3_ds.bench.gpu.speeds import Speeds
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.shapes import PAPER_SHAPES
from mocov3_ds.planning.measured_card import MeasuredStep, describe_gpu, plan_step
from mocov3_ds.planning.step_setup import StepSetup
from tests.planning.test_measured_card import RATES

CPU = torch.device("cpu")


def measured_step(recipe: str, slowness: float) -> MeasuredStep:
    setup = StepSetup(
        shape=EncoderShape(backbone=PAPER_SHAPES[recipe]),
        stage=1,
        world_size=1,
        batch=128,
        precision="bf16",
        chunks=Chunks(size=32),
    )
    return setup, slowness * plan_step(describe_gpu(RATES), setup)


def test_the_planner_is_held_against_each_step() -> None:
    measured = Speeds(dict(RATES), [measured_step("vit_s16", 1.0), measured_step("vit_l16", 2.2)])
    raw, fitted, reach = speeds.compare_planner(measured)
    assert raw.status == "note" and "1 of 2 steps within 20%, -55% to +0%" in raw.measured
    assert fitted.status == "note" and measured.reach["products"] < 700 / 989.4
    assert f"{measured.reach['products']:.2f} of the peak" in reach.measured
    exact = Speeds(dict(RATES), [measured_step("vit_s16", 1.0), measured_step("vit_l16", 1.0)])
    assert [finding.status for finding in speeds.compare_planner(exact)] == ["pass"] * 3
    assert exact.reach == {"products": pytest.approx(700 / 989.4), "spread": 1.05}


def test_without_rates_or_steps_the_planner_is_left_alone() -> None:
    for nothing in (Speeds(), Speeds(dict(RATES)), Speeds({}, [measured_step("vit_s16", 1.0)])):
        [finding] = speeds.compare_planner(nothing)
        assert finding.status == "skip" and nothing.reach == {}


def test_views_and_the_loader_are_timed_on_any_device(tmp_path: Path) -> None:
    [views] = speeds.measure_views(CPU, images=2)
    assert views.numbers["images/s"] > 0
    [loader] = speeds.measure_loader(CPU, tmp_path, images=8, batch=4, batches=2)
    assert loader.numbers["images/s"] > 0 and loader.numbers["threads"] >= 1


def test_a_network_that_does_not_fit_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speeds, "build_steps", run_out)
    [finding] = speeds.measure_steps("vit_h14", CPU, Speeds(), compiled=False)
    assert (finding.status, finding.measured) == ("skip", "does not fit")
