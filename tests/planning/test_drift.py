"""The line of a run's log that compares its memory with the plan."""

import pytest
import torch

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.drift import SETTLED, Drift
from mocov3_ds.planning.memory import Memory, MemoryItem
from mocov3_ds.planning.pace import Pace


def test_the_line() -> None:
    plan = Memory((MemoryItem("weights", 2 * GIB), MemoryItem("logits", GIB, ("loss",))))
    drift = Drift(torch.device("cuda"))  # whose allocator starts at nothing; no GPU is touched
    assert drift.describe(plan, 3.3) == "plan: memory 3.00 GiB planned, 3.30 measured (+10 %)"
    assert "3.30 measured (+10 %; 3.50 reserved)" in drift.describe(plan, 3.3, reserved_gib=3.5)
    cpu = Drift(torch.device("cpu"))
    before = float(cpu.describe(plan, 9.0).partition("beside ")[2].split()[0])
    assert before > 0.05  # the interpreter and torch
    assert f"{9 - before:.2f} measured" in cpu.describe(plan, 9.0)


def test_time_beside_it_where_the_card_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 5.5, 6.0, 6.5, 7.0])  # the first step took longer
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    drift = Drift(torch.device("cuda"))
    for _ in range(6):
        drift.record_step()
    pace = Pace(
        compute_s=0.3,
        elementwise_s=0.1,
        update_s=0.0,
        collectives=(),
        batch=8,
        operations=1.0,
        peak_rate=1.0,
    )
    plan = Memory((MemoryItem("weights", GIB),))
    assert drift.describe(plan, 1.0, pace).endswith(
        "; a step 0.40 s planned, 0.50 measured (+25 %)"
    )
    assert "a step" not in drift.describe(plan, 1.0)


def test_said_once_the_run_has_settled_and_at_its_end() -> None:
    drift, due = Drift(torch.device("cpu")), []
    for step in range(1, SETTLED + 11):
        drift.record_step()
        if drift.is_due(last=step == SETTLED + 10):
            due.append(step)
    assert due == [SETTLED, SETTLED + 10]
