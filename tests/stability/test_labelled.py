"""The labelled suite: how many of its series does `judge` call by their label?"""

import numpy as np

from tests.stability.labelled import KINDS
from tests.stability.labelled_series import make_series


def test_the_suite_is_wide_and_a_series_is_a_function_of_its_seed() -> None:
    assert len(KINDS) >= 70
    assert {kind.label for kind in KINDS.values()} == {
        "DIVERGED",
        "NOT LEARNING",
        "RESTARTED",
        "DEGRADING",
        "UNSTABLE",
        "BELOW ITS TWIN",
        "TWITCHY",
        "NOT LOOKED",
        "STABLE",
    }
    first, again, other = (make_series(KINDS["dip of 5"], seed) for seed in (0, 0, 1))
    assert np.array_equal(first.knn_K, again.knn_K)
    assert not np.array_equal(first.knn_K, other.knn_K)
