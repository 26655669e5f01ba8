"""Medians and spreads of the past alone."""

import numpy as np
import pytest

from mocov3_ds.monitoring.medians import medians_of_windows
from mocov3_ds.stability import trailing
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.trailing import (
    TrailingLevel,
    TrailingNoise,
    is_measured,
    log_of,
    longest_run,
    row_spacing,
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


def test_a_ratio_is_above_1_where_a_value_is_above_its_past_whatever_the_sign() -> None:
    values_T = np.array([-2.0, -2.0, -2.0, -2.0, -1.0, -3.0, 1.0, -2.0])
    ratio_T = trailing_ratio(values_T, 3)
    assert ratio_T[3:].tolist() == [1.0, 1.5, 0.5, 2.5, 0.0]
    assert trailing_ratio(values_T, 3, least=4.0)[3:].tolist() == [1.0, 1.25, 0.75, 1.75, 0.75]
    shifted_T = trailing_ratio(np.array([0.0, 0.0, 0.0, 1.0]), 3, least=0.5)
    assert shifted_T[3] == 3.0


def test_a_level_is_a_median_of_the_past_that_is_at_most_an_eighth_of_it_old() -> None:
    values_T = np.random.default_rng(0).standard_normal(200)
    level_T = TrailingLevel(16, 4).take(values_T)
    assert np.isnan(level_T[:4]).all() and np.isfinite(level_T[4:]).all()
    for row in range(4, 200):
        ends = range(max(row - 3, 4), row + 1)
        assert level_T[row] in [np.median(values_T[max(end - 16, 0) : end]) for end in ends]
    assert len(TrailingLevel(16, 4).take(values_T[:3])) == 3


@pytest.mark.parametrize("window", [8, 30, 200, 450])
@pytest.mark.parametrize("rows", [3, 30, 31, 200, 1000])
def test_levels_of_changed_values_are_those_of_new_ones(window: int, rows: int) -> None:
    random = np.random.default_rng(window)
    levels, noise = TrailingLevel(window, 4), TrailingNoise(window, 4)
    values_T = random.standard_normal(rows)
    for count in (0, 0, 1, 1, 3, 40, 0):
        values_T = values_T.copy()
        values_T[random.integers(0, rows, count)] += random.choice([0.01, 10.0])
        level_T = levels.take(values_T)
        np.testing.assert_array_equal(level_T, TrailingLevel(window, 4).take(values_T))
        if rows > window:
            past = values_T[:window][:: -max(window // 200, 1)]
            assert level_T[window] == np.median(past)
        for again, new in zip(
            noise.take(values_T), TrailingNoise(window, 4).take(values_T), strict=True
        ):
            np.testing.assert_array_equal(again, new)


def test_levels_that_hold_no_changed_value_are_not_taken_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sorted_windows = []

    def count_windows(windows_NW: Array) -> Array:
        sorted_windows.append(len(windows_NW))
        return medians_of_windows(windows_NW)

    monkeypatch.setattr(trailing, "medians_of_windows", count_windows)
    levels, values_T = TrailingLevel(80, 16), np.random.default_rng(0).standard_normal(1080)
    levels.take(values_T)
    levels.take(values_T.copy())
    values_T = values_T.copy()
    values_T[500] += 1
    levels.take(values_T)
    assert sorted_windows == [100, 8]


def test_a_spread_is_the_standard_deviation_of_noise() -> None:
    values_T = 3 + 2 * np.random.default_rng(0).standard_normal(4000)
    values_T[::50] += 100
    assert abs(np.nanmean(TrailingNoise(200, 16).take(values_T)[1]) - 2) < 0.2


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
