"""The line of a run's log that compares its memory with the plan."""

from pathlib import Path

import pytest
import torch

from mocov3_ds.config import parse
from mocov3_ds.planning.drift import SETTLED, Drift
from mocov3_ds.planning.hardware import GIB, card_of_device
from mocov3_ds.planning.memory import Memory, Part
from mocov3_ds.planning.pace import Pace
from mocov3_ds.training.run import build_job
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def test_the_line() -> None:
    plan = Memory((Part("weights", 2 * GIB), Part("logits", GIB, ("loss",))))
    drift = Drift(torch.device("cuda"))  # whose allocator starts at nothing; no GPU is touched
    assert drift.line(plan, 3.3) == "plan: memory 3.00 GiB planned, 3.30 measured (+10 %)"
    cpu = Drift(torch.device("cpu"))
    before = float(cpu.line(plan, 9.0).partition("beside ")[2].split()[0])
    assert before > 0.05  # the interpreter and torch
    assert f"{9 - before:.2f} measured" in cpu.line(plan, 9.0)


def test_time_beside_it_where_the_card_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 5.5, 6.0, 6.5, 7.0])  # the first step took longer
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    drift = Drift(torch.device("cuda"))
    for _ in range(6):
        drift.due(last=False)
    pace = Pace(compute=0.3, memory=0.1, update=0.0, wire=(), batch=8, operations=1.0, peak=1.0)
    plan = Memory((Part("weights", GIB),))
    assert drift.line(plan, 1.0, pace).endswith("; a step 0.40 s planned, 0.50 measured (+25 %)")
    assert "a step" not in drift.line(plan, 1.0)


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100 80GB PCIe", ""),
        ("NVIDIA GeForce GTX 1080", ""),
    ],
)
def test_cards_by_the_names_of_their_drivers(device: str, preset: str) -> None:
    card = card_of_device(device)
    assert (card.name if card else "") == preset


def test_said_once_the_run_has_settled_and_at_its_end() -> None:
    drift = Drift(torch.device("cpu"))
    due = [step for step in range(1, SETTLED + 11) if drift.due(last=step == SETTLED + 10)]
    assert due == [SETTLED, SETTLED + 10]


def pace_of_a_job(folder: Path) -> tuple[Pace | None, Pace | None, Pace | None]:
    """On the CPU, as if on a card of the presets, as if on another."""
    make_set(str(folder / "train"), [50])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    job = build_job(parse([*flags, "--runs", str(folder / "runs")]), torch.device("cpu"))
    here = job.pace()
    job.device = torch.device("cuda")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA Something"):
            patch.setattr("torch.cuda.get_device_name", lambda _device, name=name: name)
            found.append(job.pace())
    return here, found[0], found[1]


def test_a_job_knows_its_pace_on_a_card_of_the_presets(tmp_path: Path) -> None:
    [(here, known, unknown)] = run_ranks(1, pace_of_a_job, tmp_path)
    assert here is None and unknown is None
    assert known is not None and known.batch == 16 and 0 < known.step < 1
