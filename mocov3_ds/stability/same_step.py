"""How far has a run got, and what was it like at an earlier step? Pure functions of a series."""

import dataclasses

import numpy as np

from mocov3_ds.stability.findings import Series


def has_ended(series: Series) -> bool:
    """Whether a run reached its planned length, or stopped at a value that was not finite."""
    return series.stopped_non_finite or share_done(series) >= 1


def share_done(series: Series) -> float:
    """Share of the planned steps that a run has logged."""
    return float(series.steps_T[-1]) / series.total_steps if len(series.steps_T) else 0.0


def cut_series(series: Series, step: int) -> Series:
    """The series as it was after a step; what only the end or other runs tell is left out."""
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
        knn_at_end=None,
        sibling="",
        sibling_knn=None,
        siblings=0,
    )
