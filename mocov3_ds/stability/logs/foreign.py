"""What do the columns of a log say? Series as `verdict.judge` takes them, and what was understood.

Shape suffixes: T = steps, M = values of a column, K = k-NN evaluations, G = layer groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mocov3_ds.stability.findings import Array, Series, Steps
from mocov3_ds.stability.logs.clock import find_clock, spread
from mocov3_ds.stability.logs.columns import (
    GRADIENT,
    describe_bare_accuracy,
    find_columns,
    list_names,
)
from mocov3_ds.stability.logs.gaps import ends_at, flag_gaps, flag_held_over, flag_replaced_gaps
from mocov3_ds.stability.logs.lengths import find_length, is_below_its_end, total_of
from mocov3_ds.stability.logs.scalar_files import is_scalar
from mocov3_ds.stability.logs.table import Column, LoggedTable, NothingLoggedError, count_words

WHOLE = "whole network"
"""layer group of a log that has the norm of the whole gradient alone"""
_UNORDERED = 0.05  # share of rows that go back, from which on a file has no order


@dataclass(frozen=True, eq=False)
class ForeignRun:
    """A run of another program: its series, and how its log was understood."""

    series: Series
    understood: str
    """a sentence: which column means what, what was left out"""
    unit: str = "step"
    """what its steps count: "step", "epoch" or "row" """
    is_planned: bool = False
    """whether the settings beside the log tell its length; else the log's end counts as its end"""


@dataclass(frozen=True, eq=False)
class _Curve:
    """A column at the steps that count."""

    steps_M: Steps
    values_M: Array
    repeated: int
    """values that a later one of the same or an earlier step replaced"""


def read_foreign_run(table: LoggedTable, given: Sequence[str] = (), probes: int = 0) -> ForeignRun:
    """Make series of a log.

    Of steps that were logged twice, as after a resume, the last value counts; what lies behind the
    step that a resumed run went back to is dropped.

    Args:
        table: columns of the log, as they were read.
        given: MEANING=COLUMN each, as `columns.find_columns` takes them.
        probes: images that each evaluation classifies; 0 = as the log says, or unknown.

    Raises:
        ValueError: the columns are ambiguous, there is neither loss nor accuracy, or steps are no
            whole numbers; `NothingLoggedError` where these columns hold no number yet.
    """
    try:
        roles = find_columns(table.columns, given)
        clock = find_clock(table, roles)
    except ValueError as error:
        raise ValueError(f"{table.source}, run {table.name}: {error}") from None
    curves = {
        role: _align(table.columns[name], clock.steps_R)
        for role, name in roles.items()
        if role not in ("step", "epoch")
    }
    if not {"loss", "knn"} & {role for role, curve in curves.items() if len(curve.steps_M)}:
        raise _nothing_to_judge(table, roles)
    try:
        series, clauses = _build_series(table, roles, curves, clock.steps_R, probes)
    except ValueError as error:
        raise ValueError(f"{table.source}, run {table.name}: {error}") from None
    series, is_planned, of_length = _plan_length(series, table, clock.unit, roles)
    clauses += [*of_length, *describe_bare_accuracy(table.columns, given, roles)]
    understood = _describe(table, roles, curves, [*clock.clauses, *clauses])
    return ForeignRun(series, understood, clock.unit, is_planned)


def _nothing_to_judge(table: LoggedTable, roles: dict[str, str]) -> ValueError:
    """Why a table gives neither a loss nor an accuracy."""
    begins = f"{table.source}, run {table.name}: "
    unusable = [
        f"{role} = {roles[role]} has no value at a step that counts (a whole number from 0 on)"
        for role in ("loss", "knn")
        if role in roles
    ]
    if unusable:
        return ValueError(f"{begins}{'; '.join(unusable)}, so there is nothing to judge.")
    empty = [name for name in table.empty if {"loss", "knn"} & find_columns([name]).keys()]
    if empty:
        noun, verb = ("column", "holds") if len(empty) == 1 else ("columns", "hold")
        return NothingLoggedError(
            f"{begins}{noun} {list_names(empty)} {verb} no number, so there is nothing to judge."
        )
    return ValueError(begins + _name_candidates(list(table.columns)))


def _name_candidates(names: list[str]) -> str:
    """What is there, where neither a loss nor an accuracy is known by its name."""
    if is_scalar(names):
        return (
            f"{names[-1]} is one scalar as TensorBoard's page gives it, and the name of the file "
            "does not say which. Call it RUN-tag-SCALAR.csv, as the download does, or say "
            f"--columns loss={names[-1]} or knn={names[-1]}."
        )
    return (
        "neither a loss nor an accuracy is known by its name; there are "
        f"{list_names(names)}. Say which with --columns loss=COLUMN or knn=COLUMN."
    )


def _plan_length(
    series: Series, table: LoggedTable, unit: str, roles: dict[str, str]
) -> tuple[Series, bool, Sequence[str]]:
    """The series with its length, whether the settings tell it, and a clause about that.

    A column of whole epochs does not tell how many steps the last one has, so it tells no length.
    """
    epochs_M = table.columns[roles["epoch"]].values_M if "epoch" in roles else np.empty(0)
    is_exact = bool(np.any(epochs_M != np.round(epochs_M)))
    per_step = series.epochs_per_step if is_exact else math.nan
    planned, setting = find_length(table.facts, unit, per_step)
    clauses = [f"its length is that of its {setting}, {planned:,} {unit}s"] if planned else []
    if planned and is_below_its_end(series, planned):
        clauses = [f"its {setting} ({planned:,} {unit}s) is below its last step and does not count"]
        planned = 0
    total, _ = total_of(series, planned)
    return replace(series, total_steps=total), planned > 0, clauses


def _align(column: Column, clock: Array) -> _Curve:
    """A column over steps, each step once: the last value counts."""
    clock_M = clock[column.rows_M]
    is_there = np.isfinite(clock_M)
    steps_M: Steps = clock_M[is_there].astype(np.int64)
    values_M = column.values_M[is_there]
    is_kept = ~flag_replaced_gaps(steps_M, values_M)
    steps_M, values_M = steps_M[is_kept], values_M[is_kept]
    if len(steps_M) > 1 and np.mean(np.diff(steps_M) < 0) > _UNORDERED:
        order = np.argsort(steps_M, kind="stable")
        steps_M, values_M = steps_M[order], values_M[order]
    last_rows = last_of_each_step(steps_M)
    return _Curve(steps_M[last_rows], values_M[last_rows], len(steps_M) - len(last_rows))


def last_of_each_step(steps_M: Steps) -> Steps:
    """Indices of the values that no later one of the same or an earlier step replaces, ascending.

    Args:
        steps_M: steps in the order in which they were written.
    """
    if not len(steps_M):
        return np.empty(0, np.int64)
    earliest_after = np.minimum.accumulate(steps_M[::-1])[::-1]
    is_last = np.append(steps_M[:-1] < earliest_after[1:], True)
    return np.flatnonzero(is_last)


def _build_series(
    table: LoggedTable,
    roles: dict[str, str],
    curves: dict[str, _Curve],
    clock: Array,
    probes: int,
) -> tuple[Series, list[str]]:
    nothing = _Curve(np.empty(0, np.int64), np.empty(0), 0)
    knn, notes = _take_accuracies(curves.get("knn", nothing), roles.get("knn", ""))
    loss, gaps = _without_gaps(curves.get("loss", nothing), knn.steps_M)
    notes += count_words(
        gaps, "loss that is nan where none was logged", "losses that are nan where none was logged"
    )
    has_loss = len(loss.steps_M) > 0
    steps_T = loss.steps_M if has_loss else knn.steps_M
    gradients = {role.removeprefix(GRADIENT): c for role, c in curves.items() if GRADIENT in role}
    if not gradients and "grad_norm" in curves:
        gradients = {WHOLE: curves["grad_norm"]}
    grad_GT = np.full((len(gradients), len(steps_T)), np.nan)
    for row_T, curve in zip(grad_GT, gradients.values(), strict=True):
        row_T[:] = _at_steps(curve, steps_T)
    series = Series(
        steps_T=steps_T,
        loss_T=_at_steps(loss, steps_T),
        chance_loss=_last(curves.get("chance_loss", nothing), math.nan),
        lr_T=_at_steps(curves.get("lr", nothing), steps_T),
        groups=tuple(gradients),
        grad_linf_GT=grad_GT,
        rms_GT=np.full(grad_GT.shape, np.nan),
        knn_steps_K=knn.steps_M,
        knn_K=knn.values_M,
        probes=probes or int(_last(curves.get("probes", nothing), 0.0)),
        knn_chance=_last(curves.get("knn_chance", nothing), 0.0),
        total_steps=1,  # until its length is known
        epochs_per_step=_epochs_per_step(table, roles, clock),
        begins_random=_begins_random(knn, loss),
        has_loss=has_loss,
        non_finite_end=_describe_end(roles, curves),
    )
    return series, notes


def _take_accuracies(knn: _Curve, name: str) -> tuple[_Curve, list[str]]:
    """The evaluations in percent, each once, and what was left out.

    Raises:
        ValueError: accuracies are above 100.
    """
    notes: list[str] = []
    is_kept = np.isfinite(knn.values_M)
    is_negative = is_kept & (np.nan_to_num(knn.values_M) < 0)
    notes += count_words(
        int(is_negative.sum()),
        f"value of {name} below 0 is left out as no evaluation",
        f"values of {name} below 0 are left out as no evaluations",
    )
    is_kept &= ~is_negative
    steps_K, values_K = knn.steps_M[is_kept], knn.values_M[is_kept]
    is_held = flag_held_over(values_K)
    notes += count_words(
        int(is_held.sum()),
        f"value of {name} repeats the evaluation before and does not count",
        f"values of {name} repeat the evaluation before and do not count",
    )
    steps_K, values_K = steps_K[~is_held], values_K[~is_held]
    if len(values_K) and np.max(values_K) > 100:
        raise ValueError(
            f"{name} reaches {np.max(values_K):g}, which is no accuracy in percent. Say which "
            "column is with --columns knn=COLUMN, or --columns knn= for none."
        )
    values_K, unit = _as_percent(values_K, name)
    return _Curve(steps_K, values_K, knn.repeated), unit + notes


def _without_gaps(loss: _Curve, evaluated: Steps) -> tuple[_Curve, int]:
    """The losses that were logged, and the count of those that are none."""
    is_gap = flag_gaps(loss.steps_M, loss.values_M, evaluated)
    logged = _Curve(loss.steps_M[~is_gap], loss.values_M[~is_gap], loss.repeated)
    return logged, int(is_gap.sum())


def _begins_random(knn: _Curve, loss: _Curve) -> bool:
    """Whether the first evaluation is at step 0 and no loss was logged there: before training."""
    return bool(len(knn.steps_M)) and knn.steps_M[0] == 0 and 0 not in loss.steps_M[:1]


def _describe_end(roles: dict[str, str], curves: dict[str, _Curve]) -> str:
    """Which gradient or accuracy is not finite from where to the end, a clause; else empty."""
    for role, curve in curves.items():
        if role in ("knn", "grad_norm") or role.startswith(GRADIENT):
            first = ends_at(curve.values_M)
            if first is not None:
                step = int(curve.steps_M[first])
                return f"{roles[role]} was not finite from step {step} to the end"
    return ""


def _at_steps(curve: _Curve, steps_T: Steps) -> Array:
    values_T = np.full(len(steps_T), np.nan)
    _, rows, curve_rows = np.intersect1d(
        steps_T, curve.steps_M, assume_unique=True, return_indices=True
    )
    values_T[rows] = curve.values_M[curve_rows]
    return values_T


def _last(curve: _Curve, default: float) -> float:
    values_M = curve.values_M[np.isfinite(curve.values_M)]
    return float(values_M[-1]) if len(values_M) else default


def _as_percent(knn_K: Array, name: str) -> tuple[Array, list[str]]:
    """Accuracy in percent; one that is never above 1 is a share."""
    if len(knn_K) and np.max(knn_K) <= 1:
        return 100 * knn_K, [f"{name} is never above 1, so it is a share of 1"]
    return knn_K, []


def _epochs_per_step(table: LoggedTable, roles: dict[str, str], clock: Array) -> float:
    """Epochs that a step goes on, by the first and the last row that say both; NaN if unknown.

    Of whole epochs the last one is not over, so the first row of it counts.
    """
    if "epoch" not in roles:
        return math.nan
    epochs = spread(table.columns[roles["epoch"]], table.rows)
    is_known = np.isfinite(epochs) & np.isfinite(clock)
    if not is_known.any():
        return math.nan
    first, last = (
        np.argmin(np.where(is_known, clock, np.inf)),
        np.argmax(np.where(is_known, clock, -1.0)),
    )
    if np.all(epochs[is_known] == np.round(epochs[is_known])):
        last = np.argmin(np.where(is_known & (epochs == epochs[last]), clock, np.inf))
    steps = clock[last] - clock[first]
    return float((epochs[last] - epochs[first]) / steps) if steps > 0 else math.nan


def _describe(
    table: LoggedTable, roles: dict[str, str], curves: dict[str, _Curve], more: list[str]
) -> str:
    meanings = ", ".join(f"{role} = {name}" for role, name in roles.items())
    repeated = sum(curve.repeated for curve in curves.values())
    unused = [name for name in table.columns if name not in roles.values()]
    clauses = [
        f"{table.rows:,} rows",
        meanings,
        *table.notes,
        *more,
        *count_words(
            repeated,
            "value of a step that was logged again is replaced by the last",
            "values of steps that were logged again are replaced by the last",
        ),
        *([f"not used: {list_names(unused)}"] if unused else []),
    ]
    return f"{table.name}: {'; '.join(clauses)}."
