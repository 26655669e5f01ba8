"""Along which smooth curve does a loss fall? What is left of it is noise and what happens suddenly.

A level that is read off the past alone lags behind a loss that falls, by as much as that falls in
half a window. How fast it falls changes, so the lag passes for noise with heavy tails and hides
spikes, in short runs most of all. A curve of few numbers has no lag. It cannot follow what is
sudden, up or down, and hardly is it moved by that, as it is the nearest by absolute deviations. It
takes nothing of the noise either, as a curve does that is as steep as the loss wherever that is
steep. What it does not follow of slower changes is left to the level.

Losses fall fast first and then ever slower, so its numbers are evenly spaced in the logarithm of
the row.

Shape suffixes: T = rows, B = blocks of rows, P = knots.
"""

from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline

from mocov3_ds.monitoring.medians import median_of, medians_of_windows
from mocov3_ds.stability.findings import Array

FIRST_ROWS = 16
"""rows of the beginning whose changes are not resolved"""
APART = 0.4
"""distance of the knots, in logarithms of the row"""
BLOCKS = 2000
"""most blocks of rows whose medians the curve is fitted to"""
_REPEATS = 12  # weighted fits: nearly that of least absolute deviations
_CLOSE = 0.3  # deviations, in median ones, below which all weigh the same
_SETTLED = 0.2  # and by which the curve still moves where that is no matter


def smooth_trend(values_T: Array) -> Array:
    """A smooth curve through a series, (T,).

    Args:
        values_T: values of one series, finite, (T,).
    """
    rows = len(values_T)
    if rows < FIRST_ROWS:
        return np.full(rows, median_of(values_T)) if rows else np.empty(0)
    size = -(-rows // BLOCKS)
    blocks = rows // size
    if size == 1:
        block_B = values_T
    else:
        block_B = medians_of_windows(values_T[: blocks * size].reshape(blocks, size))
    basis_BP, knots_P, clock_T = _lay_knots(rows, size)
    heights_P = _fit(basis_BP, block_B)
    if size == 1:
        return basis_BP @ heights_P
    trend_T: Array = CubicSpline(knots_P, heights_P, bc_type="natural")(clock_T)
    return trend_T


@lru_cache(maxsize=4)
def _lay_knots(rows: int, size: int) -> tuple[Array, Array, Array]:
    """Curves of which one knot is 1, (B, P), the knots, (P,), and the time of each row, (T,).

    Time is that of a clock on which losses are equally smooth everywhere.
    """
    first = max(FIRST_ROWS, size)
    middle_B = size * np.arange(rows // size) + (size - 1) / 2
    clock_B, clock_T = np.log1p(middle_B / first), np.log1p(np.arange(rows) / first)
    begin, end = float(clock_B[0]), float(clock_B[-1])
    knots_P = np.linspace(begin, end, max(round((end - begin) / APART), 2) + 1)
    basis_BP: Array = CubicSpline(knots_P, np.eye(len(knots_P)), bc_type="natural")(clock_B)
    return basis_BP, knots_P, np.clip(clock_T, begin, end)


def _fit(basis_BP: Array, values_B: Array) -> Array:
    """Heights of the knots for the least sum of absolute deviations, nearly, (P,)."""
    middle = median_of(values_B)
    weighted_BP, weights_B = basis_BP, np.ones(len(values_B))
    heights_P = np.full(basis_BP.shape[1], middle)
    for _ in range(_REPEATS):
        before_P = heights_P
        weighted_BP = basis_BP * weights_B[:, None]
        heights_P = np.linalg.solve(weighted_BP.T @ basis_BP, weighted_BP.T @ values_B)
        apart_B = np.abs(values_B - basis_BP @ heights_P)
        typical = median_of(apart_B)
        if typical <= 0 or np.max(np.abs(heights_P - before_P)) < _SETTLED * typical:
            break
        weights_B = 1 / np.maximum(apart_B, _CLOSE * typical)
    return heights_P
