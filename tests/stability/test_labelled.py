"""The labelled suite: how many of its series does `judge` call by their label?"""

import numpy as np
import pytest

from mocov3_ds.stability.verdict import judge
from tests.stability.labelled import KINDS
from tests.stability.labelled_series import make_series

SHORT = [name for name, kind in KINDS.items() if kind.steps <= 1000]


def wrong(names: list[str], seed: int) -> list[str]:
    """Names of the series that are not called by their label."""
    return [n for n in names if judge(make_series(KINDS[n], seed)).verdict != KINDS[n].label]


def test_the_suite_is_wide_and_a_series_is_a_function_of_its_seed() -> None:
    assert len(KINDS) >= 70
    assert {kind.label for kind in KINDS.values()} == {
        *("DIVERGED", "NOT LEARNING", "RESTARTED", "DEGRADING", "UNSTABLE", "BELOW ITS TWIN"),
        *("TWITCHY", "NOT LOOKED", "STABLE"),
    }
    first, again, other = (make_series(KINDS["dip of 5"], seed) for seed in (0, 0, 1))
    assert np.array_equal(first.knn_K, again.knn_K)
    assert not np.array_equal(first.knn_K, other.knn_K)


def test_short_series_are_called_by_their_labels() -> None:
    assert len(SHORT) >= 10
    assert len(wrong(SHORT, 0)) <= 1


@pytest.mark.slow
def test_19_of_20_series_are_called_by_their_labels() -> None:
    missed = wrong([*KINDS], 0)
    assert len(missed) <= 0.05 * len(KINDS), missed
