"""The k-NN curve: its instability, its dips and its trends, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.knn_curve import (
    best_and_final_accuracy,
    binomial_error,
    find_declines,
    find_dips,
    instability,
    mann_kendall,
    smooth_curve,
)
from mocov3_ds.stability.verdict import judge
from tests.stability import synthetic


def test_instability_by_hand() -> None:
    """40 % for ever but for a fifth of the time at 30 %, without binomial error."""
    series = synthetic.healthy(0).series
    knn = np.full(len(series.knn_steps_K), 40.0)
    knn[100:140] = 30.0
    assert instability(replace(series, knn_K=knn, probes=0)) == pytest.approx(5.0)
    sigma = float(binomial_error(40.0, 5000))
    expected = 100 * (10 - 2 * sigma) * 0.2 / 40
    assert instability(replace(series, knn_K=knn)) == pytest.approx(expected)
    assert instability(replace(series, knn_K=np.full(200, 40.0))) == 0
    no_values = np.array([])
    empty = replace(series, knn_K=no_values, knn_steps_K=no_values.astype(int))
    assert math.isnan(instability(empty))
    assert "no k-NN evaluations, so dips and declines cannot be seen" in judge(empty).notes


def test_mann_kendall_on_trends_and_noise() -> None:
    random = np.random.default_rng(0)
    noise = [mann_kendall(random.standard_normal(30)) for _ in range(400)]
    assert 0.03 < np.mean(np.array(noise) < 0.05) < 0.08
    falling = [mann_kendall(random.standard_normal(30) - 0.1 * np.arange(30)) for _ in range(50)]
    assert np.median(falling) < 1e-3
    assert mann_kendall(np.arange(30.0)) > 0.4 and mann_kendall(np.ones(30)) == 1.0


def test_a_dip_by_hand() -> None:
    series = synthetic.healthy(0).series
    knn_K = np.full(len(series.knn_steps_K), 40.0)
    knn_K[100:140] = 30.0
    knn_K[20] = 0.0  # one odd evaluation is no dip
    dipped = replace(series, knn_K=knn_K)
    [dip] = find_dips(dipped)
    assert (dip.first, dip.lowest, dip.last) == (1010, 1010, 1410)
    assert (dip.depth, dip.relative_depth, dip.area) == (10.0, 0.25, 4000.0)
    assert dip.closed and dip.sudden and not dip.restart
    assert smooth_curve(knn_K)[20] == 40
    assert best_and_final_accuracy(dipped) == (40.0, 40.0)


def test_a_slow_slide_is_a_decline_and_no_sudden_dip() -> None:
    series = synthetic.with_decline(0).series
    dips = find_dips(series)
    declines = find_declines(series, dips, [])
    assert declines and not any(dip.sudden for dip in dips)
    assert all(decline.fall > 1 for decline in declines)
