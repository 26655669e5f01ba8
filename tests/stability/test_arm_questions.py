"""What the runs of a study say together stands in sentences, where they can answer."""

from dataclasses import replace
from pathlib import Path

import pytest

from mocov3_ds.stability.arm_questions import answer_questions, look_for_dips, measure_rates
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.study import JudgedRun, read_study
from tests.stability.judged_runs import judged_run


def run_at(lr: float, seed: int, knn: float, **settings: object) -> JudgedRun:
    label = ", ".join(["AdamW", f"lr {lr:g}", *settings])
    cell = Cell(f"{label}_{seed}", label, {"lr": lr, "seed": seed, **settings}, {})
    return replace(judged_run(label, seed, knn), cell=cell)


def test_rates_of_arms_that_differ_by_nothing_else() -> None:
    arms = {
        "low": [run_at(1e-3, seed, 30.0) for seed in range(3)],
        "high": [run_at(1e-2, seed, 40.0) for seed in range(2)],
        "another": [run_at(1e-1, 0, 20.0, qk_norm=True)],
    }
    found = measure_rates(arms)
    assert [*found] == ["AdamW"] and found["AdamW"].rates == (1e-3, 1e-2)
    assert found["AdamW"].lost.seeds == 2 and found["AdamW"].lost.mean == pytest.approx(5)
    [sentence] = answer_questions(arms)
    assert sentence == (
        "AdamW loses 5 points (95 % interval 5 to 5) against its best rate, 0.01, on average over "
        "rates from 0.001 to 0.01 (2 seeds)."
    )
    # a rate without a seed in common, and a single rate, have no number
    assert measure_rates({"low": arms["low"], "high": [run_at(1e-2, 7, 40.0)]}) == {}
    assert answer_questions({"low": arms["low"]}) == []


def test_spikes_of_all_runs_are_tested_together(study_folder: Path) -> None:
    """Each AdamW run that is trained has two planted spikes, and a dip after the first."""
    arms = read_study(study_folder).arms
    found = look_for_dips(arms)
    assert (found.runs, found.spikes) == (4, 8)
    assert answer_questions(arms)[-1] == found.describe()
    assert "AdamW, frozen" in measure_rates(arms)
