"""The k-NN curve: its dips, its declines and what they cost, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.knn_curve import (
    _lost_once,
    best_and_final_accuracy,
    examine_curve,
    find_falls,
    smooth_curve,
)
from mocov3_ds.stability.knn_noise import Noise
from mocov3_ds.stability.verdict import judge
from tests.stability import synthetic


def with_curve(*changes: tuple[slice, float]) -> Series:
    """40 % in all of 200 evaluations, every 10 steps, but for some."""
    series = synthetic.healthy(0).series
    knn_K = np.full(len(series.knn_steps_K), 40.0)
    for where, value in changes:
        knn_K[where] = value
    return replace(series, knn_K=knn_K)


def test_a_dip_and_its_cost_by_hand() -> None:
    """40 % for ever but for a fifth of the time at 30 %."""
    curve = examine_curve(with_curve((slice(100, 140), 30.0)))
    [dip] = curve.dips
    assert (dip.first, dip.lowest, dip.last) == (1010, 1010, 1410)
    assert (dip.depth, dip.relative_depth, dip.area) == (10.0, 0.25, 4000.0)
    assert dip.closed and dip.sudden and dip.restart
    assert curve.declines == () and curve.lost == pytest.approx(5.0)
    assert examine_curve(with_curve()).lost == 0
    longer = examine_curve(replace(with_curve((slice(100, 140), 30.0)), total_steps=4000))
    assert longer.lost == pytest.approx(5.0)


def test_one_low_evaluation_is_a_dip_and_not_the_best() -> None:
    dipped = with_curve((slice(80, 81), 25.0), (slice(120, 121), 42.0))
    [dip] = examine_curve(dipped).dips
    assert (dip.first, dip.last, dip.depth, dip.restart) == (810, 820, 15.0, False)
    assert smooth_curve(dipped.knn_K)[[80, 120]].tolist() == [40, 40]
    assert best_and_final_accuracy(dipped) == (40.0, 40.0)


def test_without_evaluations_nothing_is_looked_for() -> None:
    no_values = np.array([])
    empty = replace(with_curve(), knn_K=no_values, knn_steps_K=no_values.astype(int))
    curve, judgement = examine_curve(empty), judge(empty)
    assert math.isnan(curve.lost) and curve.dips == ()
    assert judgement.verdict == "NOT LOOKED" and math.isnan(judgement.smallest_dip)
    assert "0 k-NN evaluations, 8 are needed" in judgement.why


def test_a_slow_slide_is_a_decline_and_a_row_of_dips_is_none() -> None:
    slide = examine_curve(synthetic.with_decline(0).series)
    assert (
        slide.declines and slide.dips == () and all(decline.fall > 1 for decline in slide.declines)
    )
    row = [(slice(at, at + 4), 34.0) for at in range(60, 180, 15)]
    curve = examine_curve(with_curve(*row))
    assert len(curve.dips) == len(row) and curve.declines == ()


def test_a_slow_fall_of_a_long_noisy_curve_is_one_decline() -> None:
    """Not a row of dips, though noise comes back to the level before it again and again."""
    u_K = np.arange(1, 5001) / 5000
    true_K = 20 + 40 * (1 - np.exp(-u_K / 0.1)) - 10 * np.clip((u_K - 0.6) / 0.4, 0, 1)
    series = replace(synthetic.healthy(0).series, knn_steps_K=np.arange(1, 5001), total_steps=5000)
    for seed in range(3):
        noise_K = 1.6 * np.random.default_rng(seed).standard_normal(5000)
        curve = examine_curve(replace(series, knn_K=true_K + noise_K))
        [decline] = curve.declines
        assert curve.dips == () and decline.fall == pytest.approx(10, abs=0.5)
        assert 3000 < decline.first < 3250 and decline.last > 4900


def test_a_fall_from_the_random_network_is_no_dip_and_the_same_fall_later_is() -> None:
    series = synthetic.healthy(0).series
    u_K = np.linspace(0, 1, len(series.knn_K))
    knn_K = 28 + 20 * (1 - np.exp(-u_K / 0.3))
    early, late = knn_K.copy(), knn_K.copy()
    early[2:12] -= 8
    late[102:112] -= 8
    assert examine_curve(replace(series, knn_K=early)).dips == ()
    assert [d.first for d in examine_curve(replace(series, knn_K=late)).dips] == [1030]


def test_the_planned_rest_of_a_run_that_stopped_counts_as_lost() -> None:
    series = replace(with_curve(), stopped_non_finite=True, total_steps=4000)
    assert examine_curve(series).lost == pytest.approx(100 * (40 - 10) / 2 / 40)


def test_a_fall_of_a_trained_network_in_the_first_evaluations_is_a_dip() -> None:
    """A resumed log begins high: its first evaluations are no random network's."""
    run = synthetic.healthy(0).series
    noise = 0.3 * np.random.default_rng(0).standard_normal(200)
    level = np.full(200, 60.0)
    level[8:20] = 40.0
    resumed = replace(run, knn_K=level + noise, knn_at_start=None)
    assert len(examine_curve(resumed).dips) == 1
    rises = np.where(np.arange(200) < 20, level / 4, 15 + 30 * np.linspace(0, 1, 200))
    assert examine_curve(replace(run, knn_K=rises + noise, knn_at_start=None)).dips == ()
    lost = np.where(np.arange(200) < 8, 28.0, 10.0) + noise  # and never comes back
    assert examine_curve(replace(run, knn_K=lost, knn_at_start=28.0)).dips != ()


def noisy(changes: tuple[int, np.ndarray], noise: float = 0.5, seed: int = 0) -> Series:
    """55 % with noise in 200 evaluations, lower by some values from one of them on."""
    series = synthetic.healthy(0).series
    knn_K = 55 + noise * np.random.default_rng(seed).standard_normal(200)
    at, lost = changes
    knn_K[at : at + len(lost)] -= lost
    return replace(series, knn_K=knn_K, probes=10_000)


@pytest.mark.parametrize("seed", range(6))
def test_a_restart_that_heals_step_by_step_is_one_fall_of_its_depth(seed: int) -> None:
    curve = examine_curve(noisy((100, np.linspace(25, 2, 8)), seed=seed))
    [dip] = curve.dips
    assert dip.depth == pytest.approx(25, abs=1.5) and dip.restart
    assert curve.declines == ()


def test_the_lowest_of_noisy_evaluations_makes_no_restart() -> None:
    """A sixth of the level is lost; the lowest of fifteen evaluations seems a fifth."""
    dips = [examine_curve(noisy((100, np.full(15, 9.2)), 1.5, seed)).dips for seed in range(12)]
    assert all(dips) and max(dip.relative_depth for [dip, *_] in dips) > 0.2
    assert not any(dip.restart for of_run in dips for dip in of_run)
    deep = examine_curve(noisy((100, np.full(15, 16.0)), 1.5))
    assert deep.dips[0].restart


def test_what_two_falls_cost_where_they_overlap_counts_once() -> None:
    series = with_curve((slice(100, 140), 30.0))
    [fall] = find_falls(series, Noise(0.1))
    wider = replace(fall, first=90, last=150, level=41.0)
    assert _lost_once(series, [fall]) == 4000
    # ten evaluations on either side are a point below the second's level
    assert _lost_once(series, [fall, wider]) == 40 * 11 * 10 + 2 * 10 * 10
    assert _lost_once(series, []) == 0
