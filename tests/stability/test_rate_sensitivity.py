"""The cost of wrong rates: by hand, on uneven axes, and zero where rates do not matter."""

import math
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.rate_sensitivity import RateChoice, choose_rate, measure_sensitivity


def test_the_mean_loss_against_the_best_rate() -> None:
    """As in the paper's formula; three rates, the outer ones with half a weight each."""
    values_RS = np.array([[30.0, 31.0], [40.0, 41.0], [5.0, math.nan]])
    found = measure_sensitivity(
        [1e-3, 1e-2, 1e-1], values_RS, nothing_learned=10.0, higher_is_better=True
    )
    assert found.best_rate == 1e-2 and found.rates == (1e-3, 1e-2, 1e-1)
    # lost: 10, 0, 30 (31 of the second seed), bounded by guessing at 10 %
    assert found.lost.mean == pytest.approx(((10 + 30) / 4 + (10 + 31) / 4) / 2)
    assert found.lost.seeds == 2
    assert "loses 10 points (95 % interval" in found.describe()


def test_a_loss_is_better_when_lower() -> None:
    values_RS = np.array([[2.0], [1.0], [9.0]])
    found = measure_sensitivity([1, 2, 4], values_RS, nothing_learned=5.0, higher_is_better=False)
    assert found.best_rate == 2
    assert found.lost.mean == pytest.approx(1 / 4 + 4 / 4)
    text = found.describe("of the loss")
    assert "loses 1.2 of the loss (one seed) against its best rate, 2" in text


def test_rates_count_by_their_share_of_the_axis() -> None:
    values_RS = np.array([[0.0], [10.0], [10.0]])
    near, far = (
        measure_sensitivity(
            [1.0, second, 100.0], values_RS, nothing_learned=0, higher_is_better=True
        )
        for second in (2.0, 50.0)
    )
    assert near.lost.mean == pytest.approx(10 * math.log(2) / (2 * math.log(100)))
    assert far.lost.mean > 5 * near.lost.mean


def test_noise_is_no_sensitivity() -> None:
    """Rates that do not matter: the plain definition would find the luckiest rate's luck."""
    random = np.random.default_rng(0)
    lost, covered = [], []
    for _ in range(300):
        values_RS = random.normal(40, 1, (6, 4))
        found = measure_sensitivity(
            np.geomspace(1e-4, 1e-1, 6).tolist(),
            values_RS,
            nothing_learned=0,
            higher_is_better=True,
        )
        lost.append(found.lost.mean)
        covered.append(found.lost.mean_interval[0] <= 0 <= found.lost.mean_interval[1])
    plain = np.mean([random.normal(40, 1, 6).max() - 40 for _ in range(300)])
    assert abs(np.mean(lost)) < 0.1 < 1.0 < plain
    assert np.mean(covered) >= 0.9


def test_what_is_no_set_of_rates() -> None:
    for rates in ([1.0], [2.0, 1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="must be two or more"):
            measure_sensitivity(
                rates, np.ones((len(rates), 1)), nothing_learned=0, higher_is_better=True
            )
    with pytest.raises(ValueError, match=r"must be \(2, seeds\)"):
        measure_sensitivity([1, 2], np.ones((3, 1)), nothing_learned=0, higher_is_better=True)


def choice_of(means: list[float], spread: float = 0.5, seeds: int = 5, **other: Any) -> RateChoice:
    """The choice among rates 1, 3, 9, ... whose values differ between seeds by a known spread.

    Every second rate has the spread the other way round, or seeds would cancel in differences.
    """
    noise_S = spread * np.linspace(-1, 1, seeds)
    values_RS = np.array([mean + (-1) ** r * noise_S for r, mean in enumerate(means)])
    rates = [3.0**power for power in range(len(means))]
    settings = {"nothing_learned": 10.0, "higher_is_better": True, **other}
    return choose_rate(rates, values_RS, **settings)


def test_a_rate_between_others_is_told_with_its_neighbours() -> None:
    choice = choice_of([30, 40, 39.8])
    assert (choice.best, choice.next_rate, choice.is_raised) == (3, None, False)
    below, above = choice.neighbours
    assert (below.rate, above.rate, below.is_told, above.is_told) == (1, 9, True, False)
    assert below.lead == pytest.approx(10)
    # by hand: deviation of the paired difference, and t of 4 degrees
    reach = 2.776 * np.std(np.linspace(-1, 1, 5), ddof=1) / math.sqrt(5)
    assert below.interval == pytest.approx((10 - reach, 10 + reach), abs=1e-3)
    assert choice.describe() == (
        "Tried: 1, 3, 9 (5 seeds). 3 is best on average, 10 points better than 1 (95 % interval 9 "
        "to 11) and 0.2 points better than 9 (95 % interval -0.78 to 1.2: cannot be told). A lower "
        "and a higher rate were tried and were not better."
    )


def test_a_higher_rate_needs_evidence() -> None:
    choice = choice_of([30, 35, 40])
    assert choice.is_raised and choice.next_rate == 27
    assert choice.describe().endswith("It is the highest that was tried: try 27 as well.")
    for doubtful in (choice_of([30, 40, 40.3]), choice_of([30, 35, 40], seeds=1)):
        assert doubtful.best == 9
        assert doubtful.next_rate is None
        assert doubtful.describe().endswith(
            "It is the highest that was tried, but nothing tells it from 3: more seeds before a "
            "higher rate."
        )
    assert "(one seed: cannot be told)" in choice_of([30, 35, 40], seeds=1).describe()


def test_a_lower_rate_is_no_risk() -> None:
    choice = choice_of([40, 39.9, 20])
    assert (choice.best, choice.is_raised) == (1, False)
    assert choice.next_rate == pytest.approx(1 / 3)
    assert "It is the lowest that was tried: try 0.33 as well." in choice.describe()


def test_of_equal_rates_none_is_best() -> None:
    choice = choice_of([40, 40])
    assert choice.next_rate is None and "is best" not in choice.describe()
    assert "1 is as good as 3: none is to be tried next" in choice.describe()
    partly = choice_of([30, 40, 40])
    assert "and as good as 9" in partly.describe()


def test_losses_and_runs_that_learned_nothing() -> None:
    losses = choice_of([3, 2, 1], spread=0.1, nothing_learned=4.0, higher_is_better=False)
    assert losses.next_rate == 27
    assert "1 of the loss better than 3" in losses.describe("of the loss")
    nothing = choice_of([math.nan, 9, 8])
    assert math.isnan(nothing.best)
    assert nothing.describe() == (
        "Tried: 1, 3, 9 (5 seeds). None has learned anything: try lower rates, or a longer warm-up."
    )
    with pytest.raises(ValueError, match="must be two or more"):
        choice_of([30])


def test_rates_that_do_not_differ_are_not_raised() -> None:
    """At most 3 of 100 sets of equal rates, however many: the pair that decides is fixed."""
    random = np.random.default_rng(0)
    raised = [
        choose_rate(
            np.geomspace(1e-4, 1e-1, rates).tolist(),
            random.normal(40, 1, (rates, 3)),
            nothing_learned=10,
            higher_is_better=True,
        ).is_raised
        for rates in (2, 3, 7)
        for _ in range(500)
    ]
    assert 0.005 < np.mean(raised) < 0.03
