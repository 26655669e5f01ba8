"""A series as it was after a step, and how far it has got."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.same_step import cut_series, has_ended, last_step, share_done
from tests.stability.judged_runs import STEPS, judged_run


def test_a_series_as_it_was() -> None:
    series = judged_run("a", 0, 40.0).series
    cut = cut_series(replace(series, twin_knn=3.0, stopped_non_finite=True), 55)
    assert cut.steps_T.tolist() == list(range(1, 56)) and cut.knn_steps_K.tolist()[-1] == 50
    assert cut.grad_linf_GT.shape == (len(cut.groups), 55) == cut.rms_GT.shape
    assert (cut.twin_knn, cut.stopped_non_finite, cut.total_steps) == (None, False, STEPS)
    assert share_done(cut) == pytest.approx(55 / STEPS) and not has_ended(cut)
    assert cut_series(series, STEPS) is series and has_ended(series)
    assert has_ended(replace(cut, stopped_non_finite=True))
    nothing = np.empty(0, np.int64)
    assert share_done(replace(cut, steps_T=nothing, knn_steps_K=nothing)) == 0


def test_a_run_is_as_far_as_its_last_row_of_anything() -> None:
    """A loss every 7 steps and an evaluation after the last one: nothing of it is cut away."""
    series = judged_run("a", 0, 40.0).series
    late = replace(
        cut_series(series, STEPS - 4), knn_steps_K=series.knn_steps_K, knn_K=series.knn_K
    )
    assert last_step(late) == STEPS and has_ended(late)
    ended = replace(late, total_steps=STEPS - 4)
    assert has_ended(ended) and cut_series(ended, STEPS - 4) is ended


def test_repeated_rows_are_cut_by_their_steps() -> None:
    series = judged_run("a", 0, 40.0).series
    rows = [*range(60), *range(40, 100)]  # killed at step 60, resumed from step 40
    resumed = replace(
        series,
        steps_T=series.steps_T[rows],
        loss_T=series.loss_T[rows],
        lr_T=series.lr_T[rows],
        grad_linf_GT=series.grad_linf_GT[:, rows],
        rms_GT=series.rms_GT[:, rows],
    )
    assert cut_series(resumed, 50).steps_T.tolist() == list(range(1, 51))
