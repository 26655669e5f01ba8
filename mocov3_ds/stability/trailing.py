"""What is usual just before a step? Medians and spreads of the values that came before.

Shape suffix: T = rows of a series, logged or measured ones.
"""

import numpy as np

from mocov3_ds.monitoring.medians import median_of, medians_of_windows
from mocov3_ds.stability.findings import Array, Flags, Steps

MAD_TO_DEVIATION = 1.4826
"""a normal distribution's standard deviation over its median absolute deviation"""

HOPS = 8
"""a level is taken anew after such a part of its window, an eighth"""
ENOUGH = 200
"""values of a window that count, evenly spaced ones where it has more: their median is 0.09
deviations uncertain"""


def trailing_level(values_T: Array, window: int, at_least: int) -> Array:
    """Median of the `window` values before each one, (T,), taken anew every eighth of a window.

    Early values have shorter pasts; NaN where there are fewer than `at_least` of them. Of windows
    of 400 values or more, every second, third ... value counts, such that `ENOUGH` of them do.

    Args:
        values_T: finite values of one series, (T,).
        window: values of the past that count.
        at_least: fewest values that make a level.
    """
    level_T = np.full(len(values_T), np.nan)
    hop = max(1, window // HOPS)
    row = at_least
    while row < min(window, len(values_T)):
        following = max(row // HOPS, min(hop, at_least))
        level_T[row : row + following] = median_of(values_T[:row])
        row += following
    if len(values_T) > window:
        apart = max(window // ENOUGH, 1)
        earlier = np.lib.stride_tricks.sliding_window_view(values_T[:-1], window)
        levels = np.repeat(medians_of_windows(earlier[::hop, ::-apart]), hop)
        level_T[window:] = levels[: len(values_T) - window]
    return level_T


def trailing_noise(values_T: Array, window: int, at_least: int) -> tuple[Array, Array]:
    """Median of the values before each one, (T,), and their standard deviation about it, (T,).

    The deviation is that of their median absolute deviation, as events make the others larger.
    """
    if len(values_T) == 0:
        return np.empty(0), np.empty(0)
    level_T = trailing_level(values_T, window, at_least)
    apart_T = np.abs(values_T - np.where(np.isnan(level_T), median_of(values_T), level_T))
    return level_T, MAD_TO_DEVIATION * trailing_level(apart_T, window, at_least)


def window_length(rows: int, at_least: int) -> int:
    """Values of the past that a row is compared with: 1 % of the rows, or `at_least` so many."""
    return max(at_least, rows // 100)


def trailing_ratio(values_T: Array, window: int) -> Array:
    """Each value over the median of the `window` values before it; NaN where there are fewer."""
    ratio_T = np.full(len(values_T), np.nan)
    if len(values_T) > window:
        earlier = np.lib.stride_tricks.sliding_window_view(values_T[:-1], window)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_T[window:] = values_T[window:] / medians_of_windows(earlier)
    return ratio_T


def log_of(values_T: Array) -> Array:
    """Natural logarithm, -inf for 0 and NaN for NaN, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_T: Array = np.log(values_T)
    return log_T


def is_measured(*values_T: Array) -> Flags:
    """Rows in which at least one of the series was measured, (T,)."""
    return ~np.all(np.isnan(values_T), axis=0)


def row_spacing(steps_T: Steps) -> int:
    """Steps from one row to the next, most of the time; 1 for a single row."""
    return round(float(np.median(np.diff(steps_T)))) if len(steps_T) > 1 else 1


def longest_run(flags_T: Flags) -> int:
    """Length of the longest stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags_T.astype(np.int8), [0]])))
    return int(np.max(edges[1::2] - edges[::2], initial=0))
