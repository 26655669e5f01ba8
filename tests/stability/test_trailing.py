"""Medians and spreads of the past alone."""

import numpy as np

from mocov3_ds.stability.trailing import (
    is_measured,
    log_of,
    longest_run,
    row_spacing,
    trailing_level,
    trailing_noise,
    trailing_ratio,
    window_length,
)


def test_a_ratio_to_the_past_alone() -> None:
    random = np.random.default_rng(0)
    values_T = random.uniform(1, 2, 40)
    values_T[3] = np.nan
    ratio_T = trailing_ratio(values_T, 8)
    assert np.isnan(ratio_T[:8]).all()
    for t in range(8, 40):
        assert ratio_T[t] == values_T[t] / np.nanmedian(values_T[t - 8 : t])
    assert np.isnan(trailing_ratio(values_T, 40)).all()


def test_a_level_is_a_median_of_the_past_that_is_at_most_an_eighth_of_it_old() -> None:
    values_T = np.random.default_rng(0).standard_normal(200)
    level_T = trailing_level(values_T, 16, 4)
    assert np.isnan(level_T[:4]).all() and np.isfinite(level_T[4:]).all()
    for row in range(4, 200):
        ends = range(max(row - 3, 4), row + 1)
        assert level_T[row] in [np.median(values_T[max(end - 16, 0) : end]) for end in ends]
    assert len(trailing_level(values_T[:3], 16, 4)) == 3


def test_a_spread_is_the_standard_deviation_of_noise() -> None:
    values_T = 3 + 2 * np.random.default_rng(0).standard_normal(4000)
    values_T[::50] += 100
    assert abs(np.nanmean(trailing_noise(values_T, 200, 16)[1]) - 2) < 0.2


def test_windows_grow_with_long_runs() -> None:
    assert [window_length(rows, 30) for rows in (100, 3000, 50_000)] == [30, 30, 500]
    assert window_length(50_000, 200) == 500 and window_length(100, 200) == 200


def test_rows_and_steps() -> None:
    a_T, b_T = np.array([1.0, np.nan, np.nan]), np.array([np.nan, np.nan, 2.0])
    assert is_measured(a_T, b_T).tolist() == [True, False, True]
    assert row_spacing(np.array([10, 20, 30, 100])) == 10
    assert row_spacing(np.array([7])) == 1
    assert longest_run(np.array([1, 1, 0, 1, 1, 1, 0], bool)) == 3
    assert longest_run(np.zeros(3, bool)) == 0
    assert log_of(np.array([0.0, 1.0])).tolist() == [-np.inf, 0.0]
