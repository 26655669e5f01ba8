"""Which rows of a log count? Not those of steps that were repeated, nor accuracies that are none.

A killed run that went on from a checkpoint repeats steps.

Shape suffixes: T = rows, K = k-NN evaluations.
"""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.findings import Series, Steps
from mocov3_ds.stability.logs.gaps import ends_at


def keep_last_rows(series: Series) -> tuple[Series, int]:
    """The series with the last row of each step, in the order of steps; and the rows left out."""
    rows_T, rows_K = _last_of_each(series.steps_T), _last_of_each(series.knn_steps_K)
    left_out = len(series.steps_T) - len(rows_T)
    if left_out == 0 and len(rows_K) == len(series.knn_steps_K):
        in_order = np.all(np.diff(rows_T) > 0) and np.all(np.diff(rows_K) > 0)
        if in_order:
            return series, 0
    return (
        replace(
            series,
            steps_T=series.steps_T[rows_T],
            loss_T=series.loss_T[rows_T],
            lr_T=series.lr_T[rows_T],
            grad_linf_GT=series.grad_linf_GT[:, rows_T],
            rms_GT=series.rms_GT[:, rows_T],
            knn_steps_K=series.knn_steps_K[rows_K],
            knn_K=series.knn_K[rows_K],
        ),
        left_out,
    )


def drop_bad_accuracies(series: Series) -> tuple[Series, int]:
    """The series without evaluations that are not finite; and how many these were.

    Where they go on to the end, for longer than anywhere before, `non_finite_end` says so.
    """
    is_finite_K = np.isfinite(series.knn_K)
    left_out = int(np.sum(~is_finite_K))
    if left_out == 0:
        return series, 0
    end = series.non_finite_end
    first = ends_at(series.knn_K)
    if not end and first is not None:
        step = int(series.knn_steps_K[first])
        end = f"the k-NN accuracy was not finite from step {step} to the end"
    steps_K, knn_K = series.knn_steps_K[is_finite_K], series.knn_K[is_finite_K]
    return replace(series, knn_steps_K=steps_K, knn_K=knn_K, non_finite_end=end), left_out


def _last_of_each(steps: Steps) -> Steps:
    """Rows that are the last ones of their step, by step."""
    _, from_the_end = np.unique(steps[::-1], return_index=True)
    rows: Steps = len(steps) - 1 - from_the_end
    return rows
