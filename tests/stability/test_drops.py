"""Falls of a k-NN curve that are no noise."""

import numpy as np
import pytest

from mocov3_ds.stability.drops import find_drops, find_single_drops, scan
from mocov3_ds.stability.knn_noise import Noise


def test_a_curve_of_few_evaluations_has_no_falls() -> None:
    assert find_drops(np.full(7, 40.0), Noise(1.0)) == []


def test_a_scan_by_hand() -> None:
    knn = np.r_[np.full(20, 40.0), np.full(20, 30.0)]
    by_width = {width: (before, depths) for width, before, depths, _ in scan(knn, Noise(1.0))}
    before, depths = by_width[2]
    assert before == 8 and np.argmax(depths) == 20 - before
    assert depths.max() == pytest.approx(min(10.0, 4.0 + 6.0))
    [*drops] = find_drops(knn, Noise(1.0))
    assert drops[0].at == 20 and drops[0].depth == pytest.approx(10, abs=1)


def test_a_single_drop_is_below_both_sides() -> None:
    steep = np.r_[np.linspace(10, 40, 10), np.full(30, 40.0)]
    assert find_single_drops(steep, Noise(0.5)) == []
    steep[25] = 30.0
    [drop] = find_single_drops(steep, Noise(0.5))
    assert (drop.at, drop.depth) == (25, 10.0)
    up_and_down = steep.copy()
    up_and_down[15] = 44.0  # noise that goes up as far goes down as far
    assert find_single_drops(up_and_down, Noise(0.5)) == []
