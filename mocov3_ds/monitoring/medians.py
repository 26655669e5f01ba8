"""What is the median of a series, or of each of its many windows? As numpy says it, but sooner.

`np.median` looks for two middle values at a time, which numpy does value by value. It sorts short
windows with vector instructions, in a fifth of the time, and of a long series it is enough to sort
the few values near the rank that is asked for.

Shape suffixes: T = values of a series, N = windows, W = values of a window.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_WINDOWS_AT_ONCE = 4096
"""windows that are copied at a time"""
_LONG = 4096
"""values of a series from which on a sample of it tells where to look"""
_APART = 32
"""values of a series of which one is in the sample"""


def median_of(values_T: Array) -> float:
    """Median of finite values, of which there must be one."""
    count = len(values_T)
    low, high = at_ranks(values_T, [(count - 1) // 2, count // 2])
    return low if low == high else (low + high) / 2


def at_ranks(values_T: Array, ranks: Sequence[int]) -> list[float]:
    """The values that stand at some places of the sorted series, places near each other.

    Args:
        values_T: finite values, (T,).
        ranks: places, from 0 for the least value.
    """
    near_T, smaller = _values_near(values_T, min(ranks), max(ranks))
    if not smaller <= min(ranks) <= max(ranks) < smaller + len(near_T):
        near_T, smaller = values_T, 0
    sorted_T = np.sort(near_T)
    return [float(sorted_T[rank - smaller]) for rank in ranks]


def _values_near(values_T: Array, first: int, last: int) -> tuple[Array, int]:
    """Values among which those of the ranks are most likely, and how many are smaller than all."""
    if len(values_T) < _LONG:
        return values_T, 0
    sample = np.sort(values_T[::_APART])
    share = len(sample) / len(values_T)
    reach = 1.5 * math.sqrt(len(sample)) + 2  # three standard errors of a median's rank
    low, high = math.floor(first * share - reach), math.ceil(last * share + reach)
    # the least and the largest value of the sample bound nothing
    is_above_T = values_T >= (sample[low] if low >= 0 else -math.inf)
    is_near_T = is_above_T & (values_T <= (sample[high] if high < len(sample) else math.inf))
    return values_T[is_near_T], len(values_T) - int(np.count_nonzero(is_above_T))


def medians_of_windows(windows_NW: Array) -> Array:
    """Median of each window without its NaN, (N,); NaN of a window that holds nothing else."""
    begins = range(0, len(windows_NW), _WINDOWS_AT_ONCE)
    pieces = [_sort_and_halve(windows_NW[a : a + _WINDOWS_AT_ONCE]) for a in begins]
    return np.concatenate(pieces) if pieces else np.empty(0)


def _sort_and_halve(windows_NW: Array) -> Array:
    sorted_NW = np.array(windows_NW, order="C")
    sorted_NW.sort(axis=1)  # NaN come last
    width = windows_NW.shape[1]
    if not np.isnan(sorted_NW[:, -1]).any():
        return _halve(sorted_NW[:, (width - 1) // 2], sorted_NW[:, width // 2])
    count_N, row_N = width - np.sum(np.isnan(sorted_NW), axis=1), np.arange(len(sorted_NW))
    low_N, high_N = (np.maximum(index_N, 0) for index_N in ((count_N - 1) // 2, count_N // 2))
    return _halve(sorted_NW[row_N, low_N], sorted_NW[row_N, high_N])


def _halve(low_N: Array, high_N: Array) -> Array:
    """What is half the way between the two middle values; of an odd number they are one."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(low_N == high_N, low_N, (low_N + high_N) / 2)
