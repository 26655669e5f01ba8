"""A log that was written to twice: a killed run that went on from a checkpoint repeats steps.

Shape suffixes: T = rows, K = k-NN evaluations.
"""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.findings import Series, Steps


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


def _last_of_each(steps: Steps) -> Steps:
    """Rows that are the last ones of their step, by step."""
    _, from_the_end = np.unique(steps[::-1], return_index=True)
    rows: Steps = len(steps) - 1 - from_the_end
    return rows
