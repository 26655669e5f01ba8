"""The cost of wrong rates: by hand, on uneven axes, and zero where rates do not matter."""

import math

import numpy as np
import pytest

from mocov3_ds.stability.rate_sensitivity import measure_sensitivity


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
