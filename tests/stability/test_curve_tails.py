"""Tails of a curve's noise, read off lone high values."""

import math

import numpy as np
import pytest
from scipy import stats

from mocov3_ds.stability.curve_tails import SHARES, as_gaussian, curve_degrees, lone_rises


@pytest.mark.parametrize("degrees", [3.0, 6.0])
def test_degrees_are_those_of_the_noise(degrees: float) -> None:
    random = np.random.default_rng(0)
    found = [curve_degrees(random.standard_t(degrees, 20_000)) for _ in range(10)]
    assert float(np.median(found)) == pytest.approx(degrees, rel=0.15)


def test_gaussian_noise_that_remembers_or_not_has_light_tails() -> None:
    random = np.random.default_rng(1)
    white = random.standard_normal(20_000)
    assert curve_degrees(white) > 30
    assert curve_degrees(np.cumsum(white)) > 12
    assert math.isinf(curve_degrees(white[:199])) and math.isinf(curve_degrees(np.zeros(300)))


def test_quantiles_are_those_of_simulated_rises() -> None:
    rises = lone_rises(np.random.default_rng(2).standard_t(4, 400_000))
    rises = rises[rises > 0]
    ratios = np.quantile(rises, SHARES) / np.median(rises)
    assert ratios == pytest.approx([3.687, 4.921], rel=0.03)  # those of the table, for 4 degrees


@pytest.mark.parametrize("width", [1, 2, 3, 20])
def test_dips_and_steps_are_no_tails(width: int) -> None:
    random = np.random.default_rng(3)
    noise = random.standard_normal(4000)
    dipped = noise.copy()
    for begin in range(20, 4000, 50):
        dipped[begin : begin + width] -= 12
    dipped[2000:] += 30
    assert lone_rises(dipped).max() < 6
    assert curve_degrees(dipped) > 12


def test_heavy_deviations_are_moved_to_where_gaussian_ones_are_as_seldom() -> None:
    random = np.random.default_rng(4)
    heavy = 0.3 * random.standard_t(3, 100_000)
    moved = as_gaussian(heavy, 3.0)
    assert np.array_equal(np.argsort(moved), np.argsort(heavy))
    assert np.median(np.abs(moved)) == pytest.approx(np.median(np.abs(heavy)))
    deviation = 0.3 * stats.t.ppf(0.75, 3) / stats.norm.ppf(0.75)
    for share in (0.01, 0.2, 0.999):
        expected = deviation * stats.norm.ppf(share)
        assert float(np.quantile(moved, share)) == pytest.approx(expected, abs=0.05)
    assert as_gaussian(heavy, math.inf) is heavy
    assert np.array_equal(as_gaussian(np.array([0, 0, 0, 9.0]), 3.0), [0, 0, 0, 9])
