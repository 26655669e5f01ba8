"""Which values of a log's column are none? Gaps that were written as nan, and values held over.

Shape suffix: M = values of a column.
"""

import numpy as np

from mocov3_ds.stability.findings import Array, Flags, Steps

OFTEN = 0.3
"""share of a column's values that are nan from which on nan means that nothing was logged"""
OF_EVALUATIONS = 0.9
"""share of the evaluations at which a loss that is nan at nothing else is nan"""
LONGER = 3
"""a column ends in values that are not finite where that stretch is so many times as long as each
one before it"""
AT_LEAST = 5
"""and holds so many values"""
HELD = 0.9
"""share of the stretches of one accuracy that are as long as the shortest, or a multiple of it"""
FEWEST_STRETCHES = 4


def flag_replaced_gaps(steps_M: Steps, values_M: Array) -> Flags:
    """Values that are nan at a step for which the column has a finite one, too, (M,)."""
    is_gap = np.isnan(values_M)
    return is_gap & np.isin(steps_M, steps_M[np.isfinite(values_M)])


def flag_gaps(steps_M: Steps, values_M: Array, evaluated: Steps) -> Flags:
    """Values that are nan where nothing was logged: finite ones go on after them, (M,).

    That is so where nan is as frequent as a logger makes it that writes each row whole, or where
    it stands at the evaluations and nowhere else. One nan among finite losses is none.

    Args:
        steps_M: steps of the column, ascending.
        values_M: what was logged at each of them.
        evaluated: steps of the evaluations.
    """
    is_nan = np.isnan(values_M)
    nothing = np.zeros(len(values_M), bool)
    if not is_nan.any() or is_nan.all():
        return nothing
    end = _last_finite(values_M) + 1
    if len(values_M) - end <= LONGER * _longest_gap(values_M):  # the pace of the column
        end = len(values_M)
    gap_M = is_nan & (np.arange(len(values_M)) < end)
    is_frequent = np.mean(gap_M[:end]) > OFTEN
    at_evaluations = gap_M.sum() >= 2 and bool(np.isin(steps_M[gap_M], evaluated).all())
    share = np.mean(np.isin(evaluated, steps_M[gap_M])) if len(evaluated) else 0.0
    return gap_M if is_frequent or (at_evaluations and share > OF_EVALUATIONS) else nothing


def ends_at(values_M: Array) -> int | None:
    """Index from which on a column is not finite to its end; None where that is no failure.

    A stretch that is no longer than those before it is the pace at which the column was logged.
    """
    first = _last_finite(values_M) + 1
    stretch = len(values_M) - first
    if first == 0 or stretch < AT_LEAST:
        return None
    return first if stretch > LONGER * _longest_gap(values_M) else None


def _longest_gap(values_M: Array) -> int:
    """Values in the longest stretch between two finite ones."""
    finite = np.flatnonzero(np.isfinite(values_M))
    return int(np.max(np.diff(finite), initial=1)) - 1


def _last_finite(values_M: Array) -> int:
    finite = np.flatnonzero(np.isfinite(values_M))
    return int(finite[-1]) if len(finite) else -1


def flag_held_over(values_M: Array) -> Flags:
    """Accuracies that only repeat the one before, in a column that holds each until the next, (M,).

    Loggers that write each row whole do so. The stretches of one value then have one length, or
    multiples of it, which equal accuracies of real evaluations have not.
    """
    nothing = np.zeros(len(values_M), bool)
    if len(values_M) < 2:
        return nothing
    is_new = np.append(True, values_M[1:] != values_M[:-1])
    lengths = np.diff(np.append(np.flatnonzero(is_new), len(values_M)))[1:-1]  # the ends are cut
    if len(lengths) < FEWEST_STRETCHES or lengths.min() < 2:
        return nothing
    regular = np.mean(lengths % lengths.min() == 0)
    return ~is_new if regular >= HELD else nothing
