"""Noise of a k-NN curve, and falls that are none of it."""

import json
import math

import numpy as np
import pytest

from mocov3_ds.stability.calibrate import KINDS, autoregressive, calibrate_length, kinds_for
from mocov3_ds.stability.drops import (
    TABLE,
    find_drops,
    find_single_drops,
    scan,
    smallest_drop,
    threshold,
)
from mocov3_ds.stability.knn_noise import Noise, binomial_error, estimate_noise


def test_errors_of_means_and_steps_are_those_of_such_noise() -> None:
    """Against the covariance matrix, written out."""
    noise = Noise(0.6, 0.8, 0.9)
    apart = np.abs(np.subtract.outer(np.arange(20), np.arange(20)))
    covariance = 0.6**2 * np.eye(20) + 0.8**2 * 0.9**apart
    mean = np.r_[np.full(5, 1 / 5), np.zeros(15)]
    step = np.r_[np.full(8, 1 / 8), np.full(12, -1 / 12)]
    assert noise.of_mean(5) == pytest.approx(math.sqrt(mean @ covariance @ mean))
    assert noise.of_step(8, 12) == pytest.approx(math.sqrt(step @ covariance @ step))
    assert noise.deviation == pytest.approx(1.0)


@pytest.mark.parametrize(("white", "slow", "phi"), [(0.8, 0.0, 0.0), (0.5, 0.8, 0.9)])
def test_noise_is_read_off_a_rising_curve_with_dips(white: float, slow: float, phi: float) -> None:
    random = np.random.default_rng(0)
    u = np.linspace(0, 1, 2000)
    true = 20 + 40 * (1 - np.exp(-u / 0.25))
    true[700:760] -= 6
    knn = true + white * random.standard_normal(2000) + slow * autoregressive(phi)(2000, random)
    noise = estimate_noise(knn)
    assert noise.of_mean(1) == pytest.approx(math.hypot(white, slow), rel=0.15)
    assert noise.of_mean(30) == pytest.approx(Noise(white, slow, phi).of_mean(30), rel=0.4)


def test_short_and_noiseless_curves() -> None:
    assert estimate_noise(np.full(10, 40.0), probes=1000).white == pytest.approx(
        float(binomial_error(40.0, 1000))
    )
    assert 0 < estimate_noise(np.full(300, 40.0)).deviation < 0.1
    assert estimate_noise(np.array([])).deviation > 0
    assert find_drops(np.full(7, 40.0), Noise(1.0)) == []


def test_a_scan_by_hand() -> None:
    knn = np.r_[np.full(20, 40.0), np.full(20, 30.0)]
    by_width = {width: (before, depths) for width, before, depths, _ in scan(knn, Noise(1.0))}
    before, depths = by_width[2]
    assert before == 8 and np.argmax(depths) == 20 - before
    assert depths.max() == pytest.approx(min(10.0, 4.0 + 6.0))
    [*drops] = find_drops(knn, Noise(1.0))
    assert drops[0].at == 20 and drops[0].depth == pytest.approx(10, abs=1)


def test_a_single_drop_is_below_both_sides() -> None:
    steep = np.r_[np.linspace(10, 40, 10), np.full(30, 40.0)]
    assert find_single_drops(steep, Noise(0.5)) == []
    steep[25] = 30.0
    [drop] = find_single_drops(steep, Noise(0.5))
    assert (drop.at, drop.depth) == (25, 10.0)
    up_and_down = steep.copy()
    up_and_down[15] = 44.0  # noise that goes up as far goes down as far
    assert find_single_drops(up_and_down, Noise(0.5)) == []


def test_the_table_is_the_simulation_s() -> None:
    table = json.loads(TABLE.read_text())
    assert [*table] == ["8", "12", "20", "40", "60", "150", "300", "624", "1560", "5000"]
    assert calibrate_length(12) == table["12"]
    assert threshold(12) == table["12"]["threshold"]
    assert min(row["threshold"] for row in table.values()) <= threshold(900) <= 5
    assert kinds_for(20) == ["Gaussian", "t3"] and kinds_for(5000) == [*KINDS]
    narrow, wide = (smallest_drop(624, Noise(0.8), width) for width in (3, 100))
    assert narrow > 2 * wide > 0
