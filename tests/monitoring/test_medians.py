"""Medians equal numpy's bit for bit."""

import warnings

import numpy as np
import numpy.typing as npt
import pytest

from mocov3_ds.monitoring.medians import at_ranks, median_of, medians_of_windows


def series_of(count: int) -> list[npt.NDArray[np.float64]]:
    """Noise with far values, few different values, ascending ones, and a sample that misleads."""
    random = np.random.default_rng(count)
    misleading_T = random.standard_normal(count)
    misleading_T[::32] = 9
    return [
        random.standard_cauchy(count),
        np.round(random.standard_normal(count), 1),
        np.arange(count) / 7,
        misleading_T,
        np.zeros(count),
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 501, 5000, 50_001])
def test_the_median_of_a_series(count: int) -> None:
    for values_T in series_of(count):
        assert median_of(values_T) == np.median(values_T)


@pytest.mark.parametrize("count", [2, 501, 5000, 50_001])
def test_values_at_ranks(count: int) -> None:
    for values_T in series_of(count):
        for share in (0.0, 0.02, 0.5, 0.98, 1.0):
            ranks = [round(share * (count - 1)), round(share * 0.99 * (count - 1))]
            assert at_ranks(values_T, ranks) == np.sort(values_T)[ranks].tolist()


def test_few_values_of_a_long_series_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, sort = [], np.sort
    monkeypatch.setattr(np, "sort", lambda values: sizes.append(len(values)) or sort(values))
    values_T = np.random.default_rng(0).standard_normal(100_000)
    median_of(values_T)
    at_ranks(values_T, [97_500, 99_000])
    assert max(sizes) < 10_000


@pytest.mark.parametrize("width", [1, 2, 9, 30])
@pytest.mark.parametrize("count", [0, 1, 4096, 9000])
def test_the_medians_of_windows(count: int, width: int) -> None:
    windows_NW = np.random.default_rng(width).standard_cauchy((count, width))
    assert np.array_equal(medians_of_windows(windows_NW), np.median(windows_NW, axis=1))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_what_is_no_number_does_not_count(share: float) -> None:
    random = np.random.default_rng(0)
    values_T = random.standard_normal(6000)
    values_T[random.random(6000) < share] = np.nan
    values_T[[50, 51, 52]] = np.inf, np.inf, -np.inf
    windows_NW = np.lib.stride_tricks.sliding_window_view(values_T, 8)[::3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # windows without a number; inf - inf
        plain_N = np.nanmedian(windows_NW, axis=1)
        assert np.array_equal(medians_of_windows(windows_NW), plain_N, equal_nan=True)
    assert np.isnan(plain_N).any() == (share == 0.9)


def test_middle_values_that_are_alike_are_the_median_however_large() -> None:
    assert medians_of_windows(np.array([[1e308, 1e308, 1.0]])) == [1e308]
    assert medians_of_windows(np.array([[np.inf, np.inf], [-np.inf, -np.inf]])).tolist() == [
        np.inf,
        -np.inf,
    ]
