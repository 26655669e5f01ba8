"""What may be said of numbers that a few seeds gave? Paired differences, intervals, power.

Runs of one seed share initialisation, order and views, so two arms are compared seed by seed. The
interval is Student's t of the differences. A sign-flip test needs no normal differences, but its
smallest p is 2 / 2^S: it cannot pass 5 % below 6 seeds, nor pass the 42 comparisons of a page of 15
arms and 3 metrics below 11. A bootstrap of 2 to 5 values is too narrow. So t decides, and the sign
flips stand beside it. Where differences are skewed or heavy-tailed, t claims less, not more: under
the null a difference of two exchangeable runs is symmetric.

Counts and accuracies of few images are coarse: equal differences of three seeds would pass for no
spread at all. `resolution` is the step of such values; its rounding error is the least spread.

All p are two-sided. Shape suffixes: S = seeds, C = comparisons, X = any leading axes, K = points of
a curve.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from mocov3_ds.stability.findings import Array, Steps

ALPHA = 0.05
"""false claims a page, and 1 minus the coverage of the intervals"""
POWER = 0.8
"""share of studies in which a difference of the size that is told is claimed"""
MOST_SEEDS = 1000
"""seeds up to which a plan is made"""
_EXACT_FLIPS = 14
"""seeds up to which all sign flips are tried"""
_RANDOM_FLIPS = 20_000


@dataclass(frozen=True, eq=False)
class PairedTest:
    """Paired t test of one or many sets of differences.

    Attributes:
        seeds: pairs in each set.
        mean_X: mean difference.
        sd_X: standard deviation of the differences, not below what their resolution allows.
        low_X: lower end of the 95 % interval of the mean.
        high_X: upper end.
        p_X: two-sided p of no difference, for this comparison alone.
    """

    seeds: int
    mean_X: Array
    sd_X: Array
    low_X: Array
    high_X: Array
    p_X: Array


def compare_pairs(differences_XS: Array, resolution: float | Array = 0.0) -> PairedTest:
    """Paired t test over the last axis; with one seed all but the mean is NaN.

    Args:
        differences_XS: arm minus reference, one a seed, float.
        resolution: smallest step of the values that were subtracted, one number or (X,); 0 for
            continuous ones.

    Raises:
        ValueError: there is no seed.
    """
    seeds = differences_XS.shape[-1]
    if seeds == 0:
        raise ValueError("a paired test needs a seed that both arms have; there is none.")
    mean_X = differences_XS.mean(-1)
    if seeds == 1:
        nothing_X = np.full_like(mean_X, math.nan)
        return PairedTest(1, mean_X, nothing_X, nothing_X, nothing_X, nothing_X)
    # rounding to a step r has variance r^2 / 12, and a difference has it twice
    sd_X = np.maximum(differences_XS.std(-1, ddof=1), np.asarray(resolution) / math.sqrt(6))
    error_X = sd_X / math.sqrt(seeds)
    reach_X = special.stdtrit(seeds - 1, 1 - ALPHA / 2) * error_X
    with np.errstate(divide="ignore", invalid="ignore"):
        t_X = np.where(mean_X == 0, 0.0, np.abs(mean_X) / error_X)
    p_X = 2 * special.stdtr(seeds - 1, -t_X)
    return PairedTest(seeds, mean_X, sd_X, mean_X - reach_X, mean_X + reach_X, p_X)


def step_of(values: Array) -> float:
    """Smallest step between different values: the resolution of what was measured, or below it.

    0 where all are equal. NaN values count for nothing.
    """
    gaps = np.diff(np.unique(values[np.isfinite(values)]))
    # two ways of rounding one number are no step
    gaps = gaps[gaps > 1e-9 * np.abs(values[np.isfinite(values)]).max(initial=0.0)]
    return float(gaps.min()) if len(gaps) else 0.0


def holm(p_XC: Array) -> Array:
    """Holm's p of each comparison, (..., C): claims at 5 % are all true in 95 % of families.

    NaN (nothing was compared) stays, and does not count. Source: Holm 1979, any dependence.
    """
    count_X1 = np.sum(~np.isnan(p_XC), axis=-1, keepdims=True)
    order_XC = np.argsort(p_XC, axis=-1)  # NaN comes last
    sorted_XC = np.take_along_axis(p_XC, order_XC, -1)
    factor_XC = np.maximum(count_X1 - np.arange(p_XC.shape[-1]), 1)
    adjusted_XC = np.minimum(np.maximum.accumulate(sorted_XC * factor_XC, axis=-1), 1.0)
    result_XC = np.empty_like(adjusted_XC)
    np.put_along_axis(result_XC, order_XC, adjusted_XC, -1)
    return result_XC


def sign_flip_p(differences_S: Array, seed: int = 0) -> float:
    """Share of the sign flips whose mean is at least as far from 0: p without normality.

    All flips up to 14 seeds, 20,000 drawn ones beyond.
    """
    seeds = len(differences_S)
    if seeds <= _EXACT_FLIPS:
        signs_FS = np.array(list(itertools.product((1, -1), repeat=seeds)))
    else:
        generator = np.random.default_rng(seed)
        signs_FS = generator.choice((1, -1), (_RANDOM_FLIPS, seeds))
        signs_FS[0] = 1  # the flips hold the data as they are
    sums_F = np.abs(signs_FS @ differences_S)
    observed = abs(float(np.sum(differences_S)))
    return float(np.mean(sums_F >= observed * (1 - 1e-12)))


def smallest_difference(sd: float, seeds: int, comparisons: int = 1, power: float = POWER) -> float:
    """Difference that so many seeds show in `power` of the studies, in the unit of `sd`.

    Infinite with one seed. The first of Holm's steps must be passed: p below 5 % / `comparisons`.

    Args:
        sd: standard deviation of the paired differences.
        seeds: number of pairs of runs.
        comparisons: comparisons of the page.
        power: share of the studies that are to show it.
    """
    if seeds < 2:
        return math.inf
    limit = special.stdtrit(seeds - 1, 1 - ALPHA / comparisons / 2)
    shift = float(special.nctdtrinc(seeds - 1, 1 - power, limit))
    return shift * sd / math.sqrt(seeds)


def count_seeds(difference: float, sd: float, comparisons: int = 1, power: float = POWER) -> int:
    """Fewest seeds with which `smallest_difference` is at most this one.

    Raises:
        ValueError: more than 1000 would be needed, or a number is not above 0.
    """
    if not (difference > 0 and sd >= 0):
        raise ValueError(f"difference {difference} and sd {sd} must be above 0.")
    for seeds in range(2, MOST_SEEDS + 1):
        if smallest_difference(sd, seeds, comparisons, power) <= difference:
            return seeds
    raise ValueError(
        f"a difference of {difference:g} with sd {sd:g} needs more than {MOST_SEEDS} seeds; make "
        "the noise smaller (more probes, longer runs)."
    )


@dataclass(frozen=True)
class SeedSpread:
    """Values of one metric over the seeds of an arm.

    Attributes:
        seeds: finite values.
        mean: their mean; NaN without any.
        mean_interval: 95 % t interval of the mean; NaN with one seed.
        sd: standard deviation between seeds; NaN with one seed.
        sd_interval: 95 % chi-squared interval of it, for normal values; NaN with one seed.
    """

    seeds: int
    mean: float
    mean_interval: tuple[float, float]
    sd: float
    sd_interval: tuple[float, float]


def spread_over_seeds(values: Sequence[float]) -> SeedSpread:
    """Mean and standard deviation over seeds, each with its interval; NaN values are left out."""
    values_S = np.array([value for value in values if math.isfinite(value)], float)
    seeds, unknown = len(values_S), (math.nan, math.nan)
    if seeds < 2:
        mean = float(values_S[0]) if seeds else math.nan
        return SeedSpread(seeds, mean, unknown, math.nan, unknown)
    mean, sd = float(values_S.mean()), float(values_S.std(ddof=1))
    reach = float(special.stdtrit(seeds - 1, 1 - ALPHA / 2)) * sd / math.sqrt(seeds)
    low, high = (
        sd * math.sqrt((seeds - 1) / float(special.chdtri(seeds - 1, tail)))
        for tail in (ALPHA / 2, 1 - ALPHA / 2)
    )
    return SeedSpread(seeds, mean, (mean - reach, mean + reach), sd, (low, high))


@dataclass(frozen=True, eq=False)
class SeedBand:
    """Curves of several seeds as one: what a figure draws as a line in a band.

    Attributes:
        steps_K: steps at which at least one curve has a value.
        mean_K: mean over the seeds that reach there.
        sd_K: standard deviation between seeds; NaN with one.
        low_K: lower end of the 95 % t interval of the mean; NaN with one seed.
        high_K: upper end.
        seeds_K: seeds at each point.
    """

    steps_K: Steps
    mean_K: Array
    sd_K: Array
    low_K: Array
    high_K: Array
    seeds_K: Steps


def band_over_seeds(curves: Sequence[tuple[Steps, Array]]) -> SeedBand:
    """Mean, deviation and interval at each step that a curve has; between its steps it is linear.

    Args:
        curves: steps (K,), ascending, and values (K,), one a seed. NaN values are left out.

    Raises:
        ValueError: no curve has a finite value.
    """
    curves = [
        (steps_K[np.isfinite(values_K)], values_K[np.isfinite(values_K)])
        for steps_K, values_K in curves
    ]
    curves = [(steps_K, values_K) for steps_K, values_K in curves if len(steps_K)]
    if not curves:
        raise ValueError("no curve has a finite value to make a band of.")
    steps_K = np.unique(np.concatenate([steps for steps, _ in curves]))
    values_SK = np.stack(
        [np.interp(steps_K, steps, values, math.nan, math.nan) for steps, values in curves]
    )
    there_SK = np.isfinite(values_SK)
    seeds_K = there_SK.sum(0)
    mean_K = np.where(there_SK, values_SK, 0.0).sum(0) / seeds_K
    square_K = np.where(there_SK, (values_SK - mean_K) ** 2, 0.0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sd_K = np.sqrt(square_K / np.where(seeds_K > 1, seeds_K - 1, math.nan))
    quantile_K = special.stdtrit(np.maximum(seeds_K - 1, 1), 1 - ALPHA / 2)
    reach_K = quantile_K * sd_K / np.sqrt(seeds_K)
    return SeedBand(steps_K, mean_K, sd_K, mean_K - reach_K, mean_K + reach_K, seeds_K)
