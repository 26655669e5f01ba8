"""What is usual just before a step? Medians and spreads of the values that came before.

Shape suffix: T = rows of a series, logged or measured ones.
"""

import warnings
from bisect import bisect_left, insort
from collections import deque

import numpy as np

from mocov3_ds.stability.findings import Array, Flags, Steps

MAD_TO_DEVIATION = 1.4826
"""a normal distribution's standard deviation over its median absolute deviation"""


class TrailingWindow:
    """The last values of a series, their median and their robust spread.

    Args:
        length: number of values that are kept; an older one goes when a new one comes.
    """

    def __init__(self, length: int) -> None:
        self._in_order: deque[float] = deque()
        self._sorted: list[float] = []
        self._length = length

    def __len__(self) -> int:
        return len(self._in_order)

    def append(self, value: float) -> None:
        """Take in a finite value."""
        if len(self._in_order) == self._length:
            del self._sorted[bisect_left(self._sorted, self._in_order.popleft())]
        self._in_order.append(value)
        insort(self._sorted, value)

    def median(self) -> float:
        """Median of the values; there must be one."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    def spread(self) -> float:
        """Standard deviation by the median absolute deviation, which outliers do not move."""
        deviations = np.abs(np.array(self._sorted) - self.median())
        return float(MAD_TO_DEVIATION * np.median(deviations))


def window_length(rows: int, at_least: int) -> int:
    """Values of the past that a row is compared with: 1 % of the rows, or `at_least` so many."""
    return max(at_least, rows // 100)


def trailing_ratio(values_T: Array, window: int) -> Array:
    """Each value over the median of the `window` values before it; NaN where there are fewer."""
    ratio_T = np.full(len(values_T), np.nan)
    if len(values_T) > window:
        earlier = np.lib.stride_tricks.sliding_window_view(values_T[:-1], window)
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # a window without a value stays NaN
            ratio_T[window:] = values_T[window:] / np.nanmedian(earlier, axis=1)
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
