"""A run beside other arms: identical arms seldom give a verdict, arms that differ do."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.knn_noise import Noise
from mocov3_ds.stability.other_arms import (
    _accuracy_beside,
    bar_of_seeds,
    measure_spread,
    place_beside_others,
)
from mocov3_ds.stability.references import explain_behind
from mocov3_ds.stability.same_step import cut_series
from mocov3_ds.stability.study import LoggedRun, judge_cells
from tests.stability.judged_runs import STEPS, judged_run
from tests.stability.synthetic import healthy

QUIET = healthy(0, STEPS).series


def place(values_AS: npt.NDArray[np.float64], *, twin: bool = False) -> Mapping[str, Series]:
    """Runs `ARM_SEED` of these final accuracies; arm 1 has arm 0 as its twin where there is one."""
    cells, logged = [], {}
    for (arm, seed), knn in np.ndenumerate(values_AS):
        name = f"{arm}_{seed}"
        twin_name = f"0_{seed}" if twin and arm == 1 else ""
        cells.append(Cell(name, str(arm), {"seed": seed}, {}, twin_name))
        curve_K = np.full(len(QUIET.knn_K), knn)
        logged[name] = LoggedRun(replace(QUIET, knn_K=curve_K))
    return place_beside_others(cells, logged)


def share_behind(placed: Mapping[str, Series]) -> float:
    """Share of the runs that count as below another one."""
    behind = [explain_behind(s, Noise(0.3), float(s.knn_K[-1])) for s in placed.values()]
    return float(np.mean([bool(why) for why in behind]))


@pytest.mark.parametrize(("arms", "seeds"), [(2, 1), (6, 1), (2, 2), (6, 2), (4, 3)])
@pytest.mark.parametrize("deviation", [0.7, 1.5])
def test_identical_arms_are_seldom_below_one_another(
    arms: int, seeds: int, deviation: float
) -> None:
    random = np.random.default_rng([arms, seeds])
    shares = [
        share_behind(place(60 + random.normal(0, deviation, (arms, seeds)), twin=arms == 2))
        for _ in range(40)
    ]
    # one seed each, deviating by twice what is usual, is beyond the bar in 3 %
    assert np.mean(shares) <= (0.03 if seeds == 1 and deviation > 1 else 0.02)


def test_a_difference_that_all_seeds_show_is_told() -> None:
    random = np.random.default_rng(0)
    better = np.array([4.0, 0.0, 0.0])[:, None]
    told = [
        share_behind(place(60 + better + random.normal(0, 0.7, (3, 6)), twin=True))
        for _ in range(10)
    ]
    # two of the three arms are below the first
    assert np.mean(told) == pytest.approx(2 / 3, abs=0.05)
    # a ruin is told with two seeds as well, and what cannot be told in the table has no verdict
    assert share_behind(place(np.array([[60.0, 61.0], [40.0, 42.0]]))) == 0.5
    assert share_behind(place(np.array([[60.0, 61.0], [57.0, 56.0]]))) == 0.0


def test_the_bar_of_seeds_by_hand() -> None:
    values_AS = np.array([[60.0, 61.0, 59.0], [58.5, 58.5, 58.0], [59.0, 61.5, math.nan]])
    spread = measure_spread(values_AS)
    pairs = [values_AS[0] - values_AS[1], (values_AS[0] - values_AS[2])[:2]]
    pairs.append((values_AS[1] - values_AS[2])[:2])
    squares = sum(np.sum((pair - pair.mean()) ** 2) for pair in pairs)
    assert spread.deviation == pytest.approx(math.sqrt(squares / (2 + 1 + 1)))
    assert spread.degrees == 8 - 3 - 3 + 1
    assert math.isnan(bar_of_seeds(pairs[0][:1], spread, 3, 6))
    assert bar_of_seeds(np.array([5.0, 5.1, 5.2]), spread, 3, 6) == 0.0
    # the usual deviation stands in while few seeds know it badly: 2.94 of it at 1 % of 6
    few = measure_spread(np.array([[60.0, 61.0], [59.0, 59.5]]))
    assert bar_of_seeds(np.array([1.0, 1.5]), few, 3, 6) == pytest.approx(2.935 * 2.149, rel=1e-3)


def test_an_unfinished_run_is_measured_against_its_twin_at_the_same_step() -> None:
    frozen = judged_run("frozen", 0, 40.0).series
    assert _accuracy_beside(frozen, judged_run("trained", 0, 30.0).series) == 40.0
    half = judged_run("trained", 0, 30.0, upto=90).series
    assert _accuracy_beside(frozen, half) == 20.0
    # a twin that is behind tells nothing yet, one that is ahead does
    assert _accuracy_beside(cut_series(frozen, 80), half) is None
    assert _accuracy_beside(cut_series(frozen, 80), judged_run("trained", 0, 30.0).series) is None
    assert _accuracy_beside(cut_series(frozen, 120), half) == 20.0


def test_arms_of_other_batches_or_lengths_are_no_siblings() -> None:
    runs = {arm: judged_run(arm, 0, knn) for arm, knn in (("a", 60.0), ("b", 40.0))}
    cells = [run.cell for run in runs.values()]

    def siblings_of_b(epochs_per_step: float = 0.5, steps: int = STEPS) -> int:
        logged = {run.cell.name: LoggedRun(run.series) for run in runs.values()}
        first = replace(runs["a"].series, epochs_per_step=epochs_per_step, total_steps=steps)
        logged["a_seed-0"] = LoggedRun(first)
        logged["b_seed-0"] = LoggedRun(replace(runs["b"].series, epochs_per_step=0.5))
        return judge_cells(cells, logged)["b_seed-0"].series.siblings

    assert siblings_of_b() == 1
    assert siblings_of_b(0.125) == 0  # a quarter of the batch
    assert siblings_of_b(steps=150) == 0
