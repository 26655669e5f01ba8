"""What stands out of noise with light and heavy tails, and how often noise alone does."""

from functools import partial

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.outliers import (
    Past,
    common_tails,
    correlation_with_next,
    gaussian_error,
    in_a_row,
    limits,
    stand_out,
    tail_degrees,
    without_bursts,
)

DEGREES = np.array([2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 40.0])

look = partial(
    stand_out,
    past=Past(window=30, spread_window=200, at_least=16, smallest_spread=0.001),
    smallest=np.full(4, 0.01),
)


def test_limits_are_quantiles_of_the_noise() -> None:
    random = np.random.default_rng(0)
    heavy = random.standard_t(3, 200_000)
    heavy /= 1.4826 * np.median(np.abs(heavy))
    one, two, _, four = limits(heavy)
    unit = stats.norm.ppf(0.75) / stats.t.ppf(0.75, 3)
    assert one == pytest.approx(stats.t.isf(0.01 / 200_000, 3) * unit, rel=0.25)
    assert two == pytest.approx(stats.t.isf((0.01 / 200_000) ** 0.5, 3) * unit, rel=0.15)
    assert one > two > four >= 6
    assert limits(random.standard_normal(200_000)).tolist() == [6.0] * 4


def test_rows_in_a_row_prove_less_where_noise_remembers() -> None:
    random = np.random.default_rng(2)
    white = random.standard_t(5, 20_000)
    slow = lfilter([0.4], [1, -0.9], random.standard_t(5, 20_200))[200:]
    assert correlation_with_next(white) < 0.02
    assert correlation_with_next(slow) == pytest.approx(0.9, abs=0.03)
    burst = white[:400].copy()
    for begin in range(20, 400, 60):
        burst[begin : begin + 8] += 20
    assert correlation_with_next(burst) < 0.25
    ratio_of_white, ratio_of_slow = (
        limits(noise, degrees=3)[0] / limits(noise, degrees=3)[3] for noise in (white, slow)
    )
    assert ratio_of_white > 3 * ratio_of_slow > 3


def test_tails_of_a_sum_count_as_heavier_than_they_are_read() -> None:
    random = np.random.default_rng(3)
    noise = random.standard_t(4, (2, 100_000)).sum(axis=0)
    noise /= 1.4826 * np.median(np.abs(noise))
    assert tail_degrees(noise) > 4.5
    chance = 0.01 / 100_000
    four = stats.t.isf(chance, 4) * stats.norm.ppf(0.75) / stats.t.ppf(0.75, 4)
    assert limits(noise)[0] > 0.8 * four


def test_a_skewed_tail_that_falls_exponentially_is_none_of_a_heavy_t() -> None:
    """Noise of a largest value: its quantile at one in 10^5 is 10.4 deviations above its median."""
    random = np.random.default_rng(4)
    noise = random.gumbel(size=(20, 10_000))
    noise = (noise - np.median(noise)) / 1.4826 / np.median(np.abs(noise - np.median(noise)))
    exact = [limits(row, series=1, degrees=np.inf)[0] for row in noise]
    far = float(stats.gumbel_r.isf(0.01 / 10_000) - stats.gumbel_r.median())
    half = np.median(np.abs(random.gumbel(size=400_000) - stats.gumbel_r.median()))
    far /= float(1.4826 * half)
    assert far < np.quantile(exact, 0.1) and np.median(exact) < 2.5 * far
    heavy = np.abs(random.standard_t(3, (20, 10_000)))  # the lower side of it ends at once
    assert np.median([tail_degrees(row) for row in heavy]) < 3.5


def test_tails_are_read_off_the_noise() -> None:
    random = np.random.default_rng(1)
    assert np.mean([np.isinf(tail_degrees(random.standard_normal(2000))) for _ in range(50)]) > 0.6
    heavy = [tail_degrees(random.standard_t(3, 5000)) for _ in range(20)]
    assert 2.3 < np.median(heavy) < 4
    with_events = random.standard_normal(5000)
    with_events[::250] += 30
    assert tail_degrees(with_events) > 8
    assert np.isinf(tail_degrees(np.zeros(100)))


def test_rows_in_a_row() -> None:
    flags = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
    assert np.flatnonzero(in_a_row(flags, 2)).tolist() == [0, 1, 5, 6, 7]
    assert np.flatnonzero(in_a_row(flags, 3)).tolist() == [5, 6, 7]
    assert not in_a_row(flags, 9).any()


@pytest.mark.parametrize("degrees", [3, 6, 1000])
def test_noise_alone_seldom_stands_out(degrees: int) -> None:
    random = np.random.default_rng(degrees)
    found = 0
    for rows in (400, 3000):
        for _ in range(10):
            noise = 0.006 * random.standard_t(degrees, rows)
            found += look(np.cumsum(np.full(rows, -1e-4)) + noise)[0].any()
    assert found <= 2  # 0.2 are expected at one in a hundred


def test_what_stands_out_is_found_and_a_new_level_is_soon_usual() -> None:
    values = 0.003 * np.random.default_rng(0).standard_normal(2000)
    values[500], values[900:905] = 0.1, 0.05
    flags, excess = look(values)
    assert np.flatnonzero(flags).tolist() == [500, *range(900, 905)]
    assert excess[500] == pytest.approx(0.1, abs=0.01)
    values[1200:] += 1
    flagged = np.flatnonzero(look(values)[0])
    assert 1200 in flagged and flagged[-1] < 1400


def test_a_burst_leaves_the_noise_of_later_rows_as_it_was() -> None:
    values = 0.01 * np.random.default_rng(1).standard_normal(3000)
    values[1000:1080] += 0.5
    assert np.flatnonzero(look(values)[0]).tolist() == [*range(1000, 1080)]


def test_a_new_lower_level_is_no_heavy_tail() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    quiet = limits(values)
    values[200:215] -= 12
    assert np.array_equal(limits(values), quiet)


def test_bursts_are_no_part_of_the_tails() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    quiet = limits(values)
    for begin in range(30, 390, 60):
        values[begin : begin + 4] = 8, 14, 12, 7
    assert len(without_bursts(values)) == 400 - 6 * 4
    assert np.array_equal(limits(values), quiet)
    values[[50, 200]] = 20  # single rows are perhaps its tails
    assert {20.0} < {*without_bursts(values)}


def test_short_series_have_the_tails_of_all_together() -> None:
    random, past = np.random.default_rng(0), Past(200, 200, 16, 0.01)
    heavy = [random.standard_t(3, 300) for _ in range(8)]
    assert 2.3 < common_tails(heavy, past) < 4.5
    assert common_tails([random.standard_normal(300) for _ in range(8)], past) > 12
    assert common_tails([], past) == np.inf
    assert limits(random.standard_normal(300), degrees=3)[0] > 20


def plain_tail_degrees(deviations: Array) -> float:
    """`tail_degrees` by sorting both sides whole, for upper tails that are none of exponentials."""
    high = deviations - np.median(deviations)
    half = np.median(np.abs(high))
    readings = []
    for side, farthest in ((-high, 0.995), (high, 0.98)):
        values = np.sort(side[side >= 0]) / half
        for share in (0.995, 0.98, 0.95):
            if share > farthest or (share == 0.995 and len(values) < 1000):
                continue
            ratio = values[round(share * (len(values) - 1))]
            slack = 1 + 2 * gaussian_error(share, len(values))
            ratios = stats.t.ppf((1 + share) / 2, DEGREES) / stats.t.ppf(0.75, DEGREES)
            gaussian = stats.norm.ppf((1 + share) / 2) / stats.norm.ppf(0.75)
            is_gaussian = ratio <= gaussian * slack
            readings.append(np.inf if is_gaussian else np.interp(-ratio, -ratios, DEGREES))
    return float(min(*readings[:-2], max(readings[-2:])))


@pytest.mark.parametrize("count", [20, 21, 22, 399, 400, 3000, 3001])
@pytest.mark.parametrize("degrees", [2.2, 5, 1000])
def test_tails_are_those_of_values_in_order(count: int, degrees: float) -> None:
    random = np.random.default_rng(count)
    for skewed, decimals in ((False, 12), (True, 12), (False, 0)):  # with few values: many alike
        values = random.standard_t(degrees, count)
        values = np.round(np.exp(values / 3) if skewed and degrees < 10 else values, decimals)
        assert tail_degrees(values) == pytest.approx(plain_tail_degrees(values), rel=1e-9)
