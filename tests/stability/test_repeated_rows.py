"""Of rows that a log has twice the last ones count."""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.repeated_rows import keep_last_rows
from mocov3_ds.stability.verdict import judge
from tests.stability.synthetic import healthy

RUN = healthy(0).series


def test_of_repeated_steps_the_last_row_counts() -> None:
    rows = np.r_[0:1200, 1000:2000]
    loss = RUN.loss_T[rows].copy()
    loss[1000:1200] = 99.0  # what was lost with the killed attempt
    twice = replace(
        RUN,
        steps_T=RUN.steps_T[rows],
        loss_T=loss,
        lr_T=RUN.lr_T[rows],
        grad_linf_GT=RUN.grad_linf_GT[:, rows],
        rms_GT=RUN.rms_GT[:, rows],
    )
    once, left_out = keep_last_rows(twice)
    assert left_out == 200 and np.array_equal(once.loss_T, RUN.loss_T)
    assert keep_last_rows(RUN) == (RUN, 0)
    judgement = judge(twice)
    assert judgement.verdict == "STABLE"
    assert "200 rows of steps logged again later did not count" in judgement.notes


def test_evaluations_that_are_repeated_or_out_of_order() -> None:
    order = np.r_[3:8, 0:3, 5]
    knn_K = RUN.knn_K[order].copy()
    knn_K[-1] = -1.0  # the later one of two at the same step
    mixed = replace(RUN, knn_steps_K=RUN.knn_steps_K[order], knn_K=knn_K)
    once, left_out = keep_last_rows(mixed)
    assert left_out == 0, "rows of steps are counted, not evaluations"
    assert np.array_equal(once.knn_steps_K, RUN.knn_steps_K[:8])
    assert np.array_equal(once.knn_K, np.r_[RUN.knn_K[:5], -1.0, RUN.knn_K[6:8]])
