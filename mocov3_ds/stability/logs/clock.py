"""At which step was each row of a log written? By its steps, else its epochs, else its number.

Shape suffixes: R = rows of the table, M = rows in which the loss, else the accuracy, was written.
"""

from dataclasses import dataclass

import numpy as np

from mocov3_ds.stability.findings import Array, Steps
from mocov3_ds.stability.logs.columns import list_names
from mocov3_ds.stability.logs.table import Column, LoggedTable, count_words
from mocov3_ds.stability.trailing import row_spacing

MOSTLY = 0.5
"""share of the places where a counter falls at which the epoch must rise for it to start anew"""
_FEWEST_STARTS = 3
_LARGEST_STEP = 1 << 53


@dataclass(frozen=True, eq=False)
class Clock:
    """The step of each row."""

    steps_R: Array
    """NaN where a row has none"""
    unit: str
    """what is counted: "step", "epoch" or "row" """
    clauses: list[str]
    """how it was found, clauses"""


def find_clock(table: LoggedTable, roles: dict[str, str]) -> Clock:
    """The step of each row, and how it was found.

    A counter that starts anew with each epoch is counted on.

    Args:
        table: columns of the log.
        roles: which column means what.

    Raises:
        ValueError: steps are no whole numbers, or start anew and nothing tells the epoch.
    """
    rows = table.rows
    epochs_R = spread(table.columns[roles["epoch"]], rows) if "epoch" in roles else None
    if "step" in roles:
        steps_R = _read_steps(table, roles["step"])
        missing = int(np.sum(np.isnan(steps_R)))
        clauses = count_words(
            missing, "row without a step left out", "rows without a step left out"
        )
        timed = table.columns.get(roles.get("loss", "")) or table.columns.get(roles.get("knn", ""))
        if timed is not None:
            steps_R, of_epochs = _count_on(table, roles, steps_R, epochs_R, timed.rows_M)
            clauses = of_epochs or clauses
        return Clock(steps_R, "step", clauses)
    if epochs_R is not None:
        known_M = epochs_R[np.isfinite(epochs_R)]
        if np.all(known_M == np.round(known_M)) and np.all(known_M >= 0):
            return Clock(epochs_R, "epoch", [f"no step, so steps are those of {roles['epoch']}"])
    return Clock(np.arange(1.0, rows + 1), "row", ["no step, so rows are numbered"])


def spread(column: Column, rows: int) -> Array:
    """The values of a column at all rows, (R,); NaN where it was not written."""
    values_R = np.full(rows, np.nan)
    values_R[column.rows_M] = column.values_M
    return values_R


def _read_steps(table: LoggedTable, name: str) -> Array:
    """A column of steps, (R,); NaN where there is none, or one below 0."""
    steps_R = spread(table.columns[name], table.rows)
    known_M = steps_R[np.isfinite(steps_R)]
    if np.any(known_M != np.round(known_M)) or np.any(np.abs(known_M) >= _LARGEST_STEP):
        raise ValueError(f"column {name} holds steps that are no whole numbers.")
    steps_R[steps_R < 0] = np.nan
    return steps_R


def _count_on(
    table: LoggedTable, roles: dict[str, str], steps_R: Array, epochs_R: Array | None, rows_M: Steps
) -> tuple[Array, list[str]]:
    """The steps of a counter that starts anew, counted on, and a clause; else as they are.

    Raises:
        ValueError: it starts anew, and no epoch rises with it.
    """
    is_known_M = np.isfinite(steps_R[rows_M])
    rows_M = rows_M[is_known_M]
    steps_M = steps_R[rows_M].astype(np.int64)
    falls = np.flatnonzero(np.diff(steps_M) < 0)
    if not len(falls):
        return steps_R, []
    name, first, last = roles["step"], int(steps_M.min()), int(steps_M.max())
    rising = np.diff(steps_M)
    spacing = row_spacing(np.cumsum(rising[rising > 0]))
    begins_anew = float(np.median(steps_M[falls + 1])) <= first + spacing
    whole_R = None if epochs_R is None else _fill_forward(np.floor(epochs_R))
    if begins_anew and whole_R is not None:
        epochs_M = whole_R[rows_M]
        if np.mean(epochs_M[falls + 1] > epochs_M[falls]) > MOSTLY:
            length = last - first + spacing
            begun_R = (whole_R - np.nanmin(whole_R)) * length
            in_epoch_R = np.where(np.isnan(steps_R), last, steps_R)
            return begun_R + in_epoch_R, [
                f"{name} starts anew with each {roles['epoch']}, so steps are counted on, "
                f"{length:,} an epoch"
            ]
    ends = steps_M[falls]
    if begins_anew and len(falls) + 1 >= _FEWEST_STARTS and np.ptp(ends) == 0 and ends[0] == last:
        raise ValueError(
            f"column {name} starts anew {len(falls)} times after {last:,}, and no column of epochs "
            f"rises with it; there are {list_names(list(table.columns))}. Say which counts epochs "
            "with --columns epoch=COLUMN, which steps with --columns step=COLUMN, or number the "
            "rows with --columns step= ."
        )
    return steps_R, []


def _fill_forward(values_R: Array) -> Array:
    """Each value that is NaN replaced by the last one before it."""
    known_R = np.where(np.isnan(values_R), 0, np.arange(len(values_R)))
    filled_R: Array = values_R[np.maximum.accumulate(known_R)]
    return filled_R
