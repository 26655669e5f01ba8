"""Falls of a k-NN curve that are no noise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.drops import (
    clip_singles,
    find_drops,
    find_single_drops,
    highest_bump,
    scan,
    smallest_dip,
)
from mocov3_ds.stability.knn_noise import Noise, estimate_noise


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


def test_a_narrow_drop_of_a_heavy_tailed_curve_is_none_where_bumps_are_as_high() -> None:
    knn = 40 + 0.5 * np.random.default_rng(0).standard_normal(300)
    light, heavy = Noise(0.5), Noise(0.5, degrees=5.0)
    knn[100:104] -= 4
    assert find_drops(knn, heavy, widest=8)[0].at in (100, 101)
    assert highest_bump(knn, heavy, 4) < 1.5
    knn[200:204] += 4
    assert highest_bump(knn, heavy, 4) == pytest.approx(4, abs=1)
    assert find_drops(knn, heavy, widest=8) == []
    assert find_drops(knn, light, widest=8)  # between two dips is a bump, too


def test_single_evaluations_count_for_as_much_as_is_as_seldom_in_gaussian_noise() -> None:
    knn = 50 + 0.5 * np.random.default_rng(1).standard_t(3, 2000)
    knn[1000:1010] -= 9
    noise = estimate_noise(knn)
    assert 2.4 < noise.degrees < 4
    clipped = clip_singles(knn, noise)
    assert clipped[1000:1010] == pytest.approx(knn[1000:1010], abs=3)  # a dip stays
    assert np.abs(np.delete(clipped, np.s_[995:1015]) - 50).max() < 2.6
    light = clip_singles(knn, replace(noise, degrees=math.inf))
    assert np.abs(np.delete(light, np.s_[995:1015]) - 50).max() > 3


def test_heavy_tails_alone_seldom_make_a_drop() -> None:
    random, found = np.random.default_rng(1560), 0
    for _ in range(100):
        knn = 50 + 0.5 * random.standard_t(3, 1560)
        noise = estimate_noise(knn)
        found += bool(find_drops(knn, noise) or find_single_drops(knn, noise))
    assert found <= 3  # one is expected at one in a hundred


@pytest.mark.parametrize("count", [20, 100])
def test_the_smallest_dip_is_what_a_curve_that_rises_still_shows(count: int) -> None:
    found = dict.fromkeys((0.5, 1.5), 0)
    for seed in range(20):
        random = np.random.default_rng(seed)
        rise = 30 + 40 * (1 - np.exp(-np.linspace(0, 4, count)))
        quiet = rise + 0.5 * random.standard_normal(count)
        depth = smallest_dip(quiet, estimate_noise(quiet))
        at = int(random.integers(count // 2, count - 6))
        for share in found:
            curve = quiet.copy()
            curve[at : at + 3] -= share * depth
            drops = find_drops(curve, estimate_noise(curve))
            found[share] += any(abs(drop.at - at) <= 2 for drop in drops)
    assert found[0.5] <= 4 and found[1.5] >= 18
    assert math.isnan(smallest_dip(np.full(7, 40.0), Noise(1.0)))


def test_the_beginning_of_a_restart_is_no_single_evaluation() -> None:
    knn = np.full(50, 60.0) + 0.3 * np.random.default_rng(0).standard_normal(50)
    single, restart = knn.copy(), knn.copy()
    single[29] -= 17
    restart[29:34] -= [17, 14.3, 11, 7.3, 3.7]
    assert [drop.at for drop in find_single_drops(single, Noise(0.4))] == [29]
    assert find_single_drops(restart, Noise(0.4)) == []


def test_a_place_in_a_dip_that_heals_is_no_drop_of_its_own() -> None:
    knn = 55 + 0.5 * np.random.default_rng(0).standard_normal(200)
    knn[100:108] -= np.linspace(25, 2, 8)
    assert find_single_drops(knn, estimate_noise(knn)) == []


def test_one_low_evaluation_of_many_with_light_tails() -> None:
    """An eighth of the level is told where tails can be read, and not below 200."""
    found = dict.fromkeys((100, 400, 1560), 0)
    for count in found:
        for seed in range(10):
            knn = 60 + 0.4 * np.random.default_rng(seed).standard_normal(count)
            knn[count // 2] -= 8
            found[count] += bool(find_single_drops(knn, Noise(0.4)))
    assert found[100] == 0 and found[400] >= 8 and found[1560] >= 8
    heavy = Noise(0.4, degrees=3.0)
    assert find_single_drops(knn, heavy) == []
