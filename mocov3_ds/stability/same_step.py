"""How far has a run got, and what was it like at an earlier step? Pure functions of a series."""

import dataclasses
import math

import numpy as np

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.repeated_rows import keep_last_rows


def has_ended(series: Series) -> bool:
    """Whether a run reached its planned length, or stopped at a value that was not finite."""
    return series.stopped_non_finite or share_done(series) >= 1


def share_done(series: Series) -> float:
    """Share of the planned steps that a run has logged."""
    return last_step(series) / series.total_steps


def last_step(series: Series) -> int:
    """Step of the last row of anything, a loss or an evaluation; 0 without any."""
    return max(
        (int(steps[-1]) for steps in (series.steps_T, series.knn_steps_K) if len(steps)), default=0
    )


def cut_series(series: Series, step: int) -> Series:
    """The series as it was after a step; what only the end or other runs tell is left out.

    A run that has ended by then stays as it is.
    """
    series, _ = keep_last_rows(series)
    if step >= series.total_steps:  # the last evaluation may follow the last loss
        return series
    rows = int(np.searchsorted(series.steps_T, step, side="right"))
    evaluations = int(np.searchsorted(series.knn_steps_K, step, side="right"))
    if rows == len(series.steps_T) and evaluations == len(series.knn_steps_K):
        return series
    return dataclasses.replace(
        series,
        steps_T=series.steps_T[:rows],
        loss_T=series.loss_T[:rows],
        lr_T=series.lr_T[:rows],
        grad_linf_GT=series.grad_linf_GT[:, :rows],
        rms_GT=series.rms_GT[:, :rows],
        knn_steps_K=series.knn_steps_K[:evaluations],
        knn_K=series.knn_K[:evaluations],
        stopped_non_finite=False,
        twin_knn=None,
        twin_bar=math.nan,
        knn_at_end=None,
        sibling="",
        sibling_knn=None,
        sibling_bar=math.nan,
        siblings=0,
    )
