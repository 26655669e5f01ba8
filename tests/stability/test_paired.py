"""What is said of a few seeds: intervals and p by hand, false claims and power by simulation.

Shape suffixes: P = pages, A = arms, M = metrics, C = comparisons, S = seeds.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from mocov3_ds.stability import paired
from mocov3_ds.stability.findings import Array

PAGES, ARMS, METRICS = 1000, 15, 3


def test_the_paired_t_of_a_pilot() -> None:
    """Frozen minus trained at the hot rate, as computed by hand elsewhere: t(3) = 3.5, p 0.04."""
    found = paired.compare_pairs(np.array([4.05, 3.65, 0.70, 2.20]))
    assert found.mean_X == pytest.approx(2.65)
    assert (found.low_X, found.high_X) == pytest.approx((0.2, 5.1), abs=0.05)
    assert found.p_X == pytest.approx(0.04, abs=0.002)


def test_p_is_the_tail_of_students_t() -> None:
    """One and two degrees of freedom have a closed form."""
    pair_S = np.array([1.0, 3.0])
    t = 2.0 / (math.sqrt(2) / math.sqrt(2))
    assert paired.compare_pairs(pair_S).p_X == pytest.approx(1 - 2 * math.atan(t) / math.pi)
    three_S = np.array([1.0, 2.0, 4.5])
    t = three_S.mean() / (three_S.std(ddof=1) / math.sqrt(3))
    assert paired.compare_pairs(three_S).p_X == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_one_seed_says_nothing_and_no_seed_is_refused() -> None:
    one = paired.compare_pairs(np.array([[2.0], [3.0]]))
    assert one.mean_X.tolist() == [2.0, 3.0]
    assert np.isnan([one.p_X, one.low_X, one.high_X, one.sd_X]).all()
    with pytest.raises(ValueError, match="there is none"):
        paired.compare_pairs(np.empty((3, 0)))


def test_equal_differences_of_counts_are_no_certainty() -> None:
    same_S = np.array([2.0, 2.0])
    assert paired.compare_pairs(same_S).p_X == 0
    assert paired.compare_pairs(same_S, resolution=2.0).p_X > 0.1
    assert paired.compare_pairs(np.zeros(3)).p_X == 1
    assert paired.compare_pairs(np.full(6, 12.0), resolution=1.0).p_X < 1e-3


def test_the_step_of_coarse_values() -> None:
    assert paired.step_of(np.array([0.0, 2.0, math.nan, 3.0, 3.0])) == 1
    assert paired.step_of(np.array([0.1 + 0.2, 0.3, 0.8])) == pytest.approx(0.5)
    assert paired.step_of(np.array([7.0, 7.0])) == paired.step_of(np.array([])) == 0


def test_holm_step_by_step() -> None:
    p_C = [0.01, 0.04, 0.03, 0.005]
    # smallest times 4, next times 3, 2, 1, and never below the one before
    assert paired.holm(np.array(p_C)) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm(np.array([math.nan, 0.02, 0.9]))[1:] == pytest.approx([0.04, 0.9])
    assert math.isnan(paired.holm(np.array([math.nan, 0.02]))[0])


def test_sign_flips() -> None:
    assert paired.sign_flip_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert paired.sign_flip_p(np.array([1.0, -2.0, 3.0])) == 6 / 8
    x_S = np.random.default_rng(0).normal(0.6, 1.0, 20)
    t_p = float(paired.compare_pairs(x_S).p_X)
    assert paired.sign_flip_p(x_S) == pytest.approx(t_p, rel=0.25)


Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
NULLS: dict[str, Draw] = {
    "normal": lambda random, shape: random.normal(0, 1, shape),
    "heavy tails": lambda random, shape: random.standard_t(3, shape),
    "skewed": lambda random, shape: random.exponential(1, shape) ** 2,
    "rare counts": lambda random, shape: random.poisson(0.3, shape).astype(float),
    "counts": lambda random, shape: random.poisson(5, shape).astype(float),
    "few probes": lambda random, shape: np.round(random.normal(0, 1, shape) / 0.78) * 0.78,
    "many probes": lambda random, shape: np.round(random.normal(0, 1, shape), 2),
    "two values": lambda random, shape: random.integers(0, 2, shape).astype(float),
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("null", NULLS)
def test_at_most_five_percent_of_pages_without_an_effect_claim_one(null: str, seeds: int) -> None:
    """15 arms, 3 metrics: 42 comparisons with one reference, which is in all of them."""
    values_PMAS = NULLS[null](np.random.default_rng(seeds), (PAGES, METRICS, ARMS, seeds))
    step_PM = np.array([[paired.step_of(x_AS) for x_AS in page] for page in values_PMAS])
    differences_PMCS = values_PMAS[:, :, 1:] - values_PMAS[:, :, :1]
    p_PMC = paired.compare_pairs(differences_PMCS, step_PM[..., None]).p_X
    claims_P = (paired.holm(p_PMC.reshape(PAGES, -1)) < paired.ALPHA).any(-1)
    # three standard errors of a share of 5 % of 1,000 pages are 2.1 %
    assert claims_P.mean() <= 0.05 + 0.021, claims_P.mean()


def test_seeds_share_their_noise_and_pairs_remove_it() -> None:
    random = np.random.default_rng(0)
    of_the_seed_PS = random.normal(0, 5, (PAGES, 5))
    arms_PAS = of_the_seed_PS[:, None] + random.normal(0, 1, (PAGES, 2, 5))
    arms_PAS[:, 1] += 3
    found = paired.compare_pairs(arms_PAS[:, 1] - arms_PAS[:, 0])
    assert np.mean(found.p_X < 0.05) > 0.8
    covered = (found.low_X <= 3) & (found.high_X >= 3)
    assert covered.mean() == pytest.approx(0.95, abs=0.021)


@pytest.mark.parametrize("comparisons", [1, 14, 42])
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_smallest_difference_is_shown_four_times_in_five(seeds: int, comparisons: int) -> None:
    sd = 1.5
    difference = paired.smallest_difference(sd, seeds, comparisons)
    x_PS = np.random.default_rng(1).normal(difference, sd, (20_000, seeds))
    shown = np.mean(paired.compare_pairs(x_PS).p_X < paired.ALPHA / comparisons)
    assert shown == pytest.approx(paired.POWER, abs=0.012)  # four standard errors


def test_more_seeds_show_smaller_differences() -> None:
    assert paired.smallest_difference(1.5, 1) == math.inf
    found = [paired.smallest_difference(1.5, seeds) for seeds in range(2, 12)]
    assert found == sorted(found, reverse=True)
    seeds = paired.count_seeds(1.9, 1.5)
    assert (
        paired.smallest_difference(1.5, seeds) <= 1.9 < paired.smallest_difference(1.5, seeds - 1)
    )
    with pytest.raises(ValueError, match="more than 1000 seeds"):
        paired.count_seeds(0.01, 1.5)
    with pytest.raises(ValueError, match="above 0"):
        paired.count_seeds(0.0, 1.5)
    # with many seeds the normal formula holds
    quantiles = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    assert paired.smallest_difference(1.0, 400) == pytest.approx(quantiles / 20, rel=0.01)


def test_the_spread_over_seeds_covers_the_truth() -> None:
    random = np.random.default_rng(2)
    spreads = [paired.spread_over_seeds(random.normal(30, 2, 4).tolist()) for _ in range(1000)]
    mean = np.mean([s.mean_interval[0] <= 30 <= s.mean_interval[1] for s in spreads])
    sd = np.mean([s.sd_interval[0] <= 2 <= s.sd_interval[1] for s in spreads])
    assert (mean, sd) == pytest.approx((0.95, 0.95), abs=0.025)
    one = paired.spread_over_seeds([3.0, math.nan])
    assert (one.seeds, one.mean) == (1, 3.0) and math.isnan(one.sd)
    assert math.isnan(paired.spread_over_seeds([]).mean)


def test_a_band_of_curves_that_were_measured_at_different_steps() -> None:
    band = paired.band_over_seeds(
        [
            (np.array([10, 20, 30]), np.array([1.0, 2.0, 3.0])),
            (np.array([10, 30]), np.array([3.0, 5.0])),
            (np.array([10, 20]), np.array([2.0, math.nan])),
        ]
    )
    assert band.steps_K.tolist() == [10, 20, 30] and band.seeds_K.tolist() == [3, 2, 2]
    assert band.mean_K == pytest.approx([2.0, 3.0, 4.0])
    assert band.sd_K == pytest.approx([1.0, math.sqrt(2), math.sqrt(2)])
    spread = paired.spread_over_seeds([1.0, 3.0, 2.0])
    assert (band.low_K[0], band.high_K[0]) == pytest.approx(spread.mean_interval)
    alone = paired.band_over_seeds([(np.array([1]), np.array([4.0]))])
    assert alone.mean_K.tolist() == [4.0] and np.isnan(alone.low_K).all()
    with pytest.raises(ValueError, match="no curve has a finite value"):
        paired.band_over_seeds([])
