"""Noise of a k-NN curve, read off the curve."""

import math

import numpy as np
import pytest

from mocov3_ds.stability.calibrate import autoregressive
from mocov3_ds.stability.drops import find_drops
from mocov3_ds.stability.knn_noise import Noise, binomial_error, estimate_noise, local_scale


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


@pytest.mark.parametrize(
    ("count", "depth", "width", "probes"), [(6, 5.0, 4, 50_000), (10, 8, 4, 0)]
)
def test_many_dips_do_not_hide_each_other(
    count: int, depth: float, width: int, probes: int
) -> None:
    """Each takes the accuracy down at once, and it comes back within a few evaluations."""
    random = np.random.default_rng(0)
    quiet = 30 + 40 * (1 - np.exp(-np.linspace(0, 5, 100))) + 0.3 * random.standard_normal(100)
    dipping = quiet.copy()
    for first in np.linspace(20, 92, count).round().astype(int):
        dipping[first : first + width] -= np.linspace(depth, depth / 3, width)
    assert estimate_noise(quiet).deviation == pytest.approx(0.3, rel=0.6)  # it rises
    assert estimate_noise(dipping, probes).deviation < 0.6


def test_noise_that_remembers_is_no_row_of_dips() -> None:
    """It goes as far up as down; dips go down alone."""
    estimates = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        estimates.append(estimate_noise(50 + autoregressive(0.9)(624, random), 50_000))
    # 6 of 12 were read as a third to a half of what they are, and their noise as dips
    assert sorted(noise.deviation for noise in estimates)[1] > 0.6


@pytest.mark.parametrize("shape", ["later", "fifth", "grows"])
def test_noise_that_is_larger_in_one_part_of_a_curve_makes_no_drops(shape: str) -> None:
    u = np.linspace(0, 1, 1560)
    profile = {
        "later": np.where(u < 0.5, 0.4, 1.6),
        "fifth": np.where(u < 0.2, 1.6, 0.4),
        "grows": 0.3 + 1.2 * u,
    }[shape]
    alarms = 0
    for seed in range(8):
        knn = 50 + profile * np.random.default_rng(seed).standard_normal(1560)
        alarms += bool(find_drops(knn, estimate_noise(knn, 50_000)))
    assert alarms <= 1  # 2 to 8 where the noise of the whole curve counts everywhere
    scale = local_scale(knn)
    noisiest, quietest = {"later": (1200, 300), "fifth": (100, 1000), "grows": (1500, 100)}[shape]
    assert scale[noisiest] > 1.5 and scale[quietest] == 1


def test_a_dip_is_no_noisy_part() -> None:
    scales = []
    for seed in range(15):
        knn = 50 + 0.5 * np.random.default_rng(seed).standard_normal(120)
        knn[60:63] -= 6
        scales.append(local_scale(knn)[60])
    assert np.median(scales) == 1
    assert local_scale(np.full(5, 3.0)).tolist() == [1.0] * 5
