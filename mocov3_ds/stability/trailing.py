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


class TrailingLevel:
    """Medians of the `window` values before each one of a series, taken anew every eighth of it.

    Early values have shorter pasts; NaN where there are fewer than `at_least` of them. Of windows
    of 400 values or more, every second, third ... value counts, such that `ENOUGH` of them do.

    The levels of a series that comes again with a few other values are those of before, but for
    windows that hold one of these.

    Args:
        window: values of the past that count.
        at_least: fewest values that make a level.
    """

    def __init__(self, window: int, at_least: int) -> None:
        self._window, self._at_least = window, at_least
        self._values_T: Array | None = None
        self._level_T = np.empty(0)

    def take(self, values_T: Array) -> Array:
        """The level of each value, (T,), of a series of finite values, (T,)."""
        if self._values_T is None:
            level_T, changed = np.full(len(values_T), np.nan), None
        else:
            level_T, changed = self._level_T.copy(), np.flatnonzero(values_T != self._values_T)
        if changed is None or len(changed):
            self._take_early(values_T, level_T, 0 if changed is None else int(changed[0]))
            if len(values_T) > self._window:
                self._take_windows(values_T, level_T, changed)
        self._values_T, self._level_T = values_T, level_T
        return level_T

    def _take_early(self, values_T: Array, level_T: Array, changed: int) -> None:
        """Write the levels of the values that have less than a window before them.

        `changed` is the row of the first value whose level is not known yet.
        """
        row, end = self._at_least, min(self._window, len(values_T))
        while row < end:
            following = max(row // HOPS, min(self._hop, self._at_least))
            if changed < row:
                level_T[row : min(row + following, end)] = median_of(values_T[:row])
            row += following

    def _take_windows(self, values_T: Array, level_T: Array, changed: Steps | None) -> None:
        """Write the levels of whole windows: of those with a changed value, or of all."""
        apart = max(self._window // ENOUGH, 1)
        earlier = np.lib.stride_tricks.sliding_window_view(values_T[:-1], self._window)
        windows_NW = earlier[:: self._hop, ::-apart]
        if changed is None:
            levels_N = medians_of_windows(windows_NW)
        else:
            begin_N = self._hop * np.arange(len(windows_NW))
            ends = (
                np.searchsorted(changed, begin_N),
                np.searchsorted(changed, begin_N + self._window),
            )
            anew_N = ends[0] < ends[1]
            levels_N = level_T[self._window :: self._hop].copy()
            levels_N[anew_N] = medians_of_windows(windows_NW[anew_N])
        level_T[self._window :] = np.repeat(levels_N, self._hop)[: len(values_T) - self._window]

    @property
    def _hop(self) -> int:
        return max(1, self._window // HOPS)


class TrailingNoise:
    """Levels as of `TrailingLevel`, and the standard deviation of the values about them.

    The deviation is that of their median absolute deviation, as events make the others larger.

    Args:
        window: values of the past that count.
        at_least: fewest values that make a level.
    """

    def __init__(self, window: int, at_least: int) -> None:
        self._levels = TrailingLevel(window, at_least)
        self._spreads = TrailingLevel(window, at_least)

    def take(self, values_T: Array) -> tuple[Array, Array]:
        """The level of each value, (T,), and the standard deviation, (T,), of finite values."""
        if len(values_T) == 0:
            return np.empty(0), np.empty(0)
        level_T = self._levels.take(values_T)
        apart_T = np.abs(values_T - np.where(np.isnan(level_T), median_of(values_T), level_T))
        return level_T, MAD_TO_DEVIATION * self._spreads.take(apart_T)


def window_length(rows: int, at_least: int) -> int:
    """Values of the past that a row is compared with: 1 % of the rows, or `at_least` so many."""
    return max(at_least, rows // 100)


def trailing_ratio(values_T: Array, window: int, least: float = 0.0) -> Array:
    """Each value over the median of the `window` values before it; NaN where there are fewer.

    Over a median that is not above `least` it is 1 and the excess over the median, as a share of
    its absolute value or of `least`: more than 1 is above it, whatever the sign.
    """
    ratio_T = np.full(len(values_T), np.nan)
    if len(values_T) > window:
        earlier = np.lib.stride_tricks.sliding_window_view(values_T[:-1], window)
        level_T, later_T = medians_of_windows(earlier), values_T[window:]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_T[window:] = later_T / level_T
            low = np.flatnonzero(level_T <= least)
            size = np.maximum(np.abs(level_T[low]), least)
            ratio_T[window + low] = 1 + (later_T[low] - level_T[low]) / size
    return ratio_T


def log_of(values_T: Array) -> Array:
    """Natural logarithm, -inf for 0 and NaN for NaN, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_T: Array = np.log(values_T)
    return log_T


def is_measured(*values_T: Array) -> Flags:
    """Rows in which at least one of the series was measured, (T,)."""
    measured_T: Flags = ~np.isnan(values_T[0])
    for other_T in values_T[1:]:
        if measured_T.all():
            break
        measured_T |= ~np.isnan(other_T)
    return measured_T


def row_spacing(steps_T: Steps) -> int:
    """Steps from one row to the next, most of the time; 1 for a single row."""
    if len(steps_T) < 2:
        return 1
    apart = np.diff(steps_T)
    least = int(np.min(apart))
    return least if least == np.max(apart) else round(float(np.median(apart)))


def longest_run(flags_T: Flags) -> int:
    """Length of the longest stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags_T.astype(np.int8), [0]])))
    return int(np.max(edges[1::2] - edges[::2], initial=0))
