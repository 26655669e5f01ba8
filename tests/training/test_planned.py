"""A run beside its plan; what the planner does not know is said and ends no run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds.distributed import devices
from mocov3_ds.model.shapes import EncoderShape, OwnShape
from mocov3_ds.planning.drift import Drift
from mocov3_ds.planning.pace import Pace
from mocov3_ds.recipes import RECIPES, parse
from mocov3_ds.training import planned
from mocov3_ds.training.build import build_run
from mocov3_ds.training.planned import (
    _last_steps_were_whole,
    check_length,
    drift_line,
    run_pace,
    run_setup,
)
from mocov3_ds.training.start import Start
from tests.data.sets import make_set
from tests.planning.test_measured_backbone import Reading
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def compare_with_plan(folder: Path) -> tuple[list[Pace | None], list[str]]:
    """Pace on the CPU, as if on a card of the presets, as if on another; lines of the log."""
    make_set(str(folder / "train"), [50])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    run = build_run(parse([*flags, "--runs", str(folder / "runs")]), torch.device("cpu"))
    drift, setup = Drift(torch.device("cpu")), run_setup(run)
    lines, paces = [drift_line(drift, run)], [run_pace(run, setup)]
    run.device = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA Something"):
            patch.setattr("torch.cuda.get_device_name", lambda _device, name=name: name)
            paces.append(run_pace(run, setup))
    run.device, run.dtype = torch.device("cpu"), torch.float64
    lines.append(drift_line(drift, run))
    return paces, lines


def test_a_run_beside_its_plan(tmp_path: Path) -> None:
    [((cpu, known, unknown), (compared, unplanned))] = run_ranks(1, compare_with_plan, tmp_path)
    assert cpu is None and unknown is None
    assert known is not None and known.batch == 16 and 0 < known.step_s < 1
    assert compared.startswith("plan: memory 0.00 GiB planned")
    assert unplanned == ("plan: this run cannot be compared with one (KeyError: torch.float64)")


def test_the_lengths_of_an_extended_run_are_those_of_its_own_schedule() -> None:
    new = replace(RECIPES["tiny"].config, extend_schedule="new", compress="4x")
    for config, step, whole in (
        (new, 9500, False),
        (new, 9990, True),
        (replace(new, extend_schedule="longer"), 9500, True),
    ):
        run: Any = SimpleNamespace(
            config=config, step=step, total_steps=10_000, start=Start(step=9000)
        )
        assert _last_steps_were_whole(run) == whole


def test_days_on_the_cpu_are_refused_unless_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, long = torch.device("cpu"), RECIPES["vit_s16"].config
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "is_cpu_meant", lambda: False)
    with pytest.raises(ValueError, match=r"no GPU is seen.*1000 steps would take \d+ days"):
        check_length(long, cpu, 1000)
    check_length(long, torch.device("cuda"), 1000)
    check_length(replace(long, stop_after_steps=10), cpu, 1000)
    check_length(RECIPES["tiny"].config, cpu, 100_000)
    with pytest.raises(ValueError, match=r"400 steps would take 3 days"):
        check_length(long, cpu, 400)
    check_length(replace(long, compress="4x"), cpu, 400)
    convnet = replace(long, compress="4x", model=replace(long.model, backbone="resnet18"))
    with pytest.raises(ValueError, match="resnet18 has none that can be left out"):
        check_length(convnet, cpu, 400)
    monkeypatch.setattr(torch.version, "cuda", None)  # a torch for CPUs was chosen
    check_length(long, cpu, 1000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "is_cpu_meant", lambda: True)
    check_length(long, cpu, 1000)


def test_a_run_whose_operations_cannot_be_counted_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RECIPES["vit_s16"].config
    shape = EncoderShape(backbone=OwnShape(name="reading", make=Reading))
    monkeypatch.setattr(planned, "encoder_shape", lambda _config: shape)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "is_cpu_meant", lambda: False)
    for compress in ("off", "4x"):
        check_length(replace(config, compress=compress), torch.device("cpu"), 1000)
