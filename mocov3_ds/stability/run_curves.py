"""What did one run log? Its rows as arrays, and long curves made short enough to draw.

Shape suffixes: T = rows logged, M = rows in which a value was measured, C = columns of a drawing,
G = layer groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.monitoring.medians import medians_of_windows
from mocov3_ds.monitoring.metrics_file import Row, read_rows
from mocov3_ds.monitoring.signal_file import SignalTable, read_signals
from mocov3_ds.stability.findings import Array, Flags, Steps

COLUMNS = 600
"""most points of a drawn curve, and most columns of a heat map"""
_PAST = 6  # columns whose median is the usual gradient of the next one


@dataclass(frozen=True, eq=False)
class RunCurves:
    """The rows of a run, value by value."""

    steps_T: Steps
    """optimizer steps done at each row, ascending"""
    values: Mapping[str, Array]
    """name in `metrics.jsonl` -> (T,), NaN where a row has no such number"""
    alarms: Mapping[str, Steps]
    """name of an early alarm -> steps at which it was raised"""
    signals: SignalTable | None
    """signals of the layer groups; None where none were logged"""

    def curve(self, name: str) -> tuple[Steps, Array]:
        """Steps (M,) and values (M,) of a curve where it has some."""
        values_T = self.values.get(name)
        if values_T is None:
            return np.empty(0, np.int64), np.empty(0)
        is_there_T = np.isfinite(values_T)
        return self.steps_T[is_there_T], values_T[is_there_T]

    def median(self, name: str) -> float:
        """Median of a value over the second half of its rows; NaN without any."""
        _, values_M = self.curve(name)
        return float(np.median(values_M[len(values_M) // 2 :])) if len(values_M) else math.nan

    def last(self, name: str) -> float:
        """Last value of a curve; NaN without any."""
        _, values_M = self.curve(name)
        return float(values_M[-1]) if len(values_M) else math.nan

    def first(self, name: str) -> float:
        """First value of a curve; NaN without any."""
        _, values_M = self.curve(name)
        return float(values_M[0]) if len(values_M) else math.nan

    def total(self, name: str) -> float:
        """Sum of a value over all rows."""
        return float(self.curve(name)[1].sum())


def read_curves(run: Path) -> tuple[RunCurves, Sequence[Row]]:
    """Read the log of a run, finished or not; also its rows, in the order of steps.

    Of a step that was logged again, as after a resume, the last row counts.

    Args:
        run: run folder, with `metrics.jsonl`.

    Raises:
        ValueError: nothing is logged yet.
    """
    rows = _keep_last_rows(read_rows(run / "metrics.jsonl"))
    if not any("loss" in row for row in rows):
        raise ValueError(f"{run} has not logged a step yet.")
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    alarms: dict[str, list[int]] = {}
    for row in rows:
        for alarm in row["alarms"] if isinstance(row.get("alarms"), list) else ():
            alarms.setdefault(str(alarm), []).append(row["step"])
    curves = RunCurves(
        steps_T=np.array([row["step"] for row in rows], np.int64),
        values={name: np.array([_as_number(row.get(name)) for row in rows]) for name in names},
        alarms={name: np.array(steps, np.int64) for name, steps in alarms.items()},
        signals=_read_signals(run),
    )
    return curves, rows


def _keep_last_rows(rows: Sequence[Row]) -> list[Row]:
    """The last row of each step, in the order of steps.

    What the run began with stands in a row of its own, which no step replaces.
    """
    last_rows = {(row["step"], "loss" in row or "lr" in row): row for row in rows}
    return [last_rows[key] for key in sorted(last_rows)]


def _as_number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _read_signals(run: Path) -> SignalTable | None:
    if not (run / "signals.json").exists():
        return None
    table = read_signals(run)
    if not len(table.steps):
        return None
    if np.all(np.diff(table.steps) > 0):
        return table
    _, from_the_end = np.unique(table.steps[::-1], return_index=True)
    last_rows = len(table.steps) - 1 - from_the_end
    return replace(table, values_TC=table.values_TC[last_rows])


def shorten_curve(
    steps_M: Steps, values_M: Array, columns: int = COLUMNS
) -> tuple[Array, Array, Array, Array]:
    """Middle step, least, median and largest value of at most `columns` stretches of a curve.

    A curve that is short enough stays as it is.
    """
    if len(steps_M) <= columns:
        return steps_M.astype(float), values_M, values_M, values_M
    edges = _edges_of_stretches(len(steps_M), columns)
    return (
        np.add.reduceat(steps_M, edges[:-1]) / np.diff(edges),
        np.minimum.reduceat(values_M, edges[:-1]),
        _medians_of_stretches(values_M, edges),
        np.maximum.reduceat(values_M, edges[:-1]),
    )


def _edges_of_stretches(rows: int, count: int) -> Steps:
    """Where so many stretches begin, of lengths that differ by one at most; the last row's end."""
    return np.linspace(0, rows, count + 1).astype(np.int64)


def _medians_of_stretches(values_M: Array, edges: Steps) -> Array:
    """Median of each stretch of a curve without NaN, (C,)."""
    rows_CW = edges[:-1, None] + np.arange(np.max(np.diff(edges)))
    values_CW = values_M[np.minimum(rows_CW, len(values_M) - 1)]
    values_CW[rows_CW >= edges[1:, None]] = np.nan  # of a shorter stretch
    return medians_of_windows(values_CW)


def gradient_heat(table: SignalTable, columns: int = COLUMNS) -> tuple[Sequence[str], Array]:
    """The heat map of a run's signals, as `heat_of_gradients` gives it."""
    return heat_of_gradients(table.groups, table.grid("grad_linf").astype(float), columns)


def heat_of_gradients(
    names: Sequence[str], grad_GT: Array, columns: int = COLUMNS
) -> tuple[Sequence[str], Array]:
    """Groups that are trained, and log10 of each one's largest gradient over its usual one, (G, C).

    A column holds the largest gradient of its steps; the usual one is the median of the steps of
    the six columns before it. NaN where nothing was measured, or nothing before.
    """
    is_measured_T = np.isfinite(grad_GT).any(0)
    is_trained_G: Flags = np.any(np.isfinite(grad_GT), axis=1)
    grad_GM = grad_GT[is_trained_G][:, is_measured_T]
    groups = [group for group, trained in zip(names, is_trained_G, strict=True) if trained]
    steps = grad_GM.shape[1]
    if not steps:
        return groups, np.empty((len(groups), 0))
    edges = _edges_of_stretches(steps, min(columns, steps))
    window = max(_PAST, 30 * (len(edges) - 1) // steps)  # 30 steps at least
    largest_GC = np.maximum.reduceat(grad_GM, edges[:-1], axis=1)
    middle_GC = np.stack([_medians_of_stretches(grad_M, edges) for grad_M in grad_GM])
    middle_GC[np.isnan(largest_GC)] = np.nan
    heat_GC = np.full(largest_GC.shape, np.nan)
    if largest_GC.shape[1] > window:
        earlier = np.lib.stride_tricks.sliding_window_view(middle_GC[:, :-1], window, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            heat_GC[:, window:] = np.log10(largest_GC[:, window:] / np.median(earlier, axis=2))
    return groups, heat_GC
