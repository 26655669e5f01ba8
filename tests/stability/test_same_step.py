"""A series as it was after a step, and how far it has got."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.same_step import cut_series, has_ended, share_done
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
    assert share_done(replace(cut, steps_T=np.empty(0, np.int64))) == 0
