"""How noisy is a k-NN curve? Read off the curve itself: a white part and a part with a memory.

A queue's accuracy remembers: the next evaluation shares most of the bank with this one. So noise is
white noise plus an autoregressive part. Both come from second differences of the means of blocks of
one, two, four ... evaluations, in which a trend cancels:

    Var(mean_1 - 2 mean_2 + mean_3) = 6 white^2 / length + slow^2 * (what correlations of phi^|i-j|
    leave of it)

A low quantile of their absolute values keeps dips and steep beginnings out, as long as they are
few. A curve that dips again and again is told by its upper side, which dips leave alone
(`_quiet_side`).

Shape suffixes: K = k-NN evaluations, L = lengths of blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import special
from scipy.ndimage import maximum_filter1d
from scipy.optimize import isotonic_regression

from mocov3_ds.stability.curve_tails import curve_degrees
from mocov3_ds.stability.findings import Array

LENGTHS = (1, 2, 4, 8, 16, 32)
"""evaluations of a block"""
MEMORIES = (0.3, 0.5, 0.7, 0.8, 0.9)
"""values of phi that are tried"""
BLOCKS = 25
"""blocks that a curve must have of a length: longer ones would see it bend"""
FEWEST_FOR_MEMORY = 40
"""evaluations below which the noise counts as white"""
REMEMBERS = 0.2
"""share of the variance that is in the next evaluation, too, from which a curve's noise remembers;
white noise passes for such in few curves"""
SMALLEST = 0.02
"""points: least noise, for curves without any"""

AROUND = 16
"""evaluations around one, and before it, that tell the level of a curve that dips"""
FAR_BELOW = 4.67
"""deviations below their third quartile that noise is seldom: 4 below the level"""
FAR_BELOW_OFTEN, FAR_BELOW_OFTEN_KNOWN = (5, 0.03), (4, 0.02)
"""evaluations so far below those before them, and share of all, that make dips; fewer where the
noise would be `OVER_BINOMIAL` times that of the probes"""
OVER_BINOMIAL = 4.0
AS_FAR_UP, FAR_ABOVE, RISE_AROUND = 0.1, 2.5, 0.05
"""share of the evaluations `FAR_BELOW` the curve's rise that are so many deviations above it, from
which its noise wanders to both sides, and is no row of dips; the rise is that of the third quartile
of this share of the curve to either side"""
QUIET, QUIET_LONG, LONG = 0.6, 0.75, 250
"""share of the noise by differences below which that of the upper side counts in its stead: in a
short curve, and in one of so many evaluations, which makes a memory's excursions fewer"""

PARTS, FEWEST_OF_PART, UNLIKE = (4, 16), 25, 1.5
"""windows of a curve, and evaluations of one, whose noise is told apart from that of the whole
where it is so many of its standard errors larger"""
OF_A_DIP = 6
"""second differences that the two edges of a dip enlarge: so many of a window do not count"""

_QUANTILE = 0.4  # of absolute differences: below the median, as dips make the larger ones
_GAUSSIAN_QUANTILE = float(special.ndtri((1 + _QUANTILE) / 2))
_UPPER = 0.75  # quantile of the level of a curve that dips
_MEDIAN_ABOVE = float(special.ndtri((1 + _UPPER) / 2) - special.ndtri(_UPPER))


@dataclass(frozen=True)
class Noise:
    """Noise of a k-NN curve, in points.

    Attributes:
        white: standard deviation of the part that is new in each evaluation.
        slow: standard deviation of the part that remembers.
        memory: its correlation from one evaluation to the next.
        degrees: tails of the noise are those of a Student's t of so many degrees.
    """

    white: float
    slow: float = 0.0
    memory: float = 0.0
    degrees: float = math.inf

    @property
    def deviation(self) -> float:
        """Standard deviation of one evaluation."""
        return math.hypot(self.white, self.slow)

    @property
    def remembers(self) -> bool:
        """Whether much of the noise of an evaluation is in the next one, too."""
        return self.memory * self.slow**2 > REMEMBERS * self.deviation**2

    def of_mean(self, count: int) -> float:
        """Standard error of the mean of so many evaluations in a row."""
        slow = _sum_of_correlations(self.memory, count) / count**2
        return math.sqrt(self.white**2 / count + self.slow**2 * slow)

    def of_step(self, before: int, after: int) -> float:
        """Standard error of the mean of some evaluations minus that of those right after them."""
        phi = self.memory
        shared = phi * (1 - phi**before) * (1 - phi**after) / (1 - phi) ** 2 / (before * after)
        slow = (
            _sum_of_correlations(phi, before) / before**2
            + _sum_of_correlations(phi, after) / after**2
            - 2 * shared
        )
        white = 1 / before + 1 / after
        return math.sqrt(self.white**2 * white + self.slow**2 * max(slow, 0.0))


def _sum_of_correlations(phi: float, count: int) -> float:
    """Sum of phi^|i - j| over all pairs of so many evaluations."""
    return count * (1 + phi) / (1 - phi) - 2 * phi * (1 - phi**count) / (1 - phi) ** 2


def binomial_error(accuracy: Array | float, probes: int) -> Array:
    """Standard error in points of an accuracy in percent on so many images; 0 if unknown."""
    p = np.clip(np.asarray(accuracy, float) / 100, 0.0, 1.0)
    return 100 * np.sqrt(p * (1 - p) / probes) if probes else np.zeros_like(p)


def estimate_noise(knn_K: Array, probes: int = 0) -> Noise:
    """Noise of a curve; of a short one at least the binomial error of its probes.

    Args:
        knn_K: accuracies in percent, (K,).
        probes: images that each evaluation classifies; 0 if unknown.
    """
    if len(knn_K) < 3:
        return Noise(max(SMALLEST, *(_binomial(knn_K, probes), 0.0)))
    lengths_L = [n for n in LENGTHS if BLOCKS * n <= len(knn_K)] or [1]
    variance_L = np.array([_variance_of_differences(knn_K, n) for n in lengths_L])
    if len(knn_K) < FEWEST_FOR_MEMORY:
        white = math.sqrt(variance_L[0] / 6)
        return Noise(max(SMALLEST, white, _binomial(knn_K, probes)))
    if (variance_L * lengths_L).min() <= 6 * SMALLEST**2:
        return Noise(max(SMALLEST, math.sqrt(float(np.median(variance_L * lengths_L)) / 6)))
    noise = replace(_fit(lengths_L, variance_L), degrees=curve_degrees(knn_K))
    return _quiet_side(noise, knn_K, _binomial(knn_K, probes))


def _quiet_side(noise: Noise, knn_K: Array, binomial: float) -> Noise:
    """The noise of the upper side, of a curve whose dips are too many for its differences.

    Dips leave the highest quarter around each evaluation alone, so its spread tells the noise. It
    counts where it is much smaller than that by differences, many evaluations are far below those
    before them, and few as far above the curve's rise: noise with a memory goes to both sides.

    Args:
        noise: what differences of the curve tell of it.
        knn_K: accuracies in percent, (K,).
        binomial: error of the probes in points; 0 if unknown.
    """
    half = AROUND // 2
    padded = np.pad(knn_K, half, mode="reflect", reflect_type="odd")
    around = np.lib.stride_tricks.sliding_window_view(padded, AROUND + 1)
    above_K = knn_K - np.quantile(around, _UPPER, axis=1)
    spread = float(np.median(above_K[above_K > 0])) / _MEDIAN_ABOVE if (above_K > 0).any() else 0.0
    spread = max(spread, binomial, SMALLEST)
    earlier = np.lib.stride_tricks.sliding_window_view(knn_K[:-1], AROUND)
    fallen = np.quantile(earlier, _UPPER, axis=1) - knn_K[AROUND:] > FAR_BELOW * spread
    is_wide = 0 < OVER_BINOMIAL * binomial < noise.deviation
    fewest, share = FAR_BELOW_OFTEN_KNOWN if is_wide else FAR_BELOW_OFTEN
    quiet = QUIET_LONG if len(knn_K) >= LONG else QUIET
    if spread > quiet * noise.deviation or np.sum(fallen) < max(fewest, share * len(knn_K)):
        return noise
    if _wanders_up(knn_K, spread):
        return noise
    scale = spread / noise.deviation
    return Noise(scale * noise.white, scale * noise.slow, noise.memory)


def local_scale(knn_K: Array) -> Array:
    """How much larger the noise around each evaluation is than that of the whole curve, (K,).

    Noise may follow the rate or the accuracy, and what falls where it is large is told by that
    noise. At least 1: where it is smaller than elsewhere nothing is the easier to tell.
    """
    apart = np.abs(knn_K[:-2] - 2 * knn_K[1:-1] + knn_K[2:])
    scale_K = np.ones(len(knn_K))
    for parts in PARTS:
        width = max(len(knn_K) // parts, FEWEST_OF_PART)
        whole = float(np.quantile(apart, _QUANTILE)) if len(apart) >= 2 * width else 0.0
        if whole == 0:
            continue
        hop = max(width // 8, 1)
        windows = np.lib.stride_tricks.sliding_window_view(apart, width)[::hop]
        share = _QUANTILE * (1 - OF_A_DIP / width)
        scale = np.quantile(windows, share, axis=1) / whole
        scale[scale < 1 + UNLIKE * _quantile_error(width)] = 1.0
        middles = hop * np.arange(len(scale)) + (width + 1) / 2
        around_K = np.interp(np.arange(len(knn_K)), middles, scale)
        # a window that begins to be noisy is noisy from its middle on at the latest
        scale_K = np.maximum(scale_K, maximum_filter1d(around_K, width // 2))
    return scale_K


def _quantile_error(count: int) -> float:
    """Relative standard error of the quantile of so many second differences of white noise."""
    density = 2 * math.exp(-(_GAUSSIAN_QUANTILE**2) / 2) / math.sqrt(2 * math.pi)
    independent = count / 2  # neighbours share two of three evaluations
    return math.sqrt(_QUANTILE * (1 - _QUANTILE) / independent) / density / _GAUSSIAN_QUANTILE


def _wanders_up(knn_K: Array, spread: float) -> bool:
    """Whether a curve goes far above its rise as well as below it, as noise with a memory does."""
    half = max(AROUND // 2, round(RISE_AROUND * len(knn_K)))
    padded = np.pad(knn_K, half, mode="reflect", reflect_type="odd")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    rise_K = isotonic_regression(np.quantile(around, _UPPER, axis=1), increasing=True).x
    below = np.sum(knn_K - rise_K < -FAR_BELOW * spread)
    return bool(np.sum(knn_K - rise_K > FAR_ABOVE * spread) > AS_FAR_UP * below)


def _binomial(knn_K: Array, probes: int) -> float:
    return float(np.median(binomial_error(knn_K, probes))) if len(knn_K) else 0.0


def _variance_of_differences(knn_K: Array, length: int) -> float:
    """Robust variance of the second differences of the means of all blocks of a length."""
    sums = np.concatenate([[0.0], np.cumsum(knn_K)])
    means = (sums[length:] - sums[:-length]) / length
    differences = means[: -2 * length] - 2 * means[length:-length] + means[2 * length :]
    return float(np.quantile(np.abs(differences), _QUANTILE) / _GAUSSIAN_QUANTILE) ** 2


@cache
def _slow_variance(length: int, phi: float) -> float:
    """Variance of a second difference of blocks of autoregressive noise of deviation 1."""
    weights = np.repeat([1.0, -2.0, 1.0], length) / length
    apart = np.abs(np.subtract.outer(np.arange(3 * length), np.arange(3 * length)))
    return float(weights @ phi**apart @ weights)


def _fit(lengths_L: Sequence[int], variance_L: Array) -> Noise:
    """White and slow part that explain the variances best, by relative least squares."""
    white_L = 6 / np.array(lengths_L) / variance_L
    best, smallest_miss = Noise(0.0), math.inf
    for phi in MEMORIES:
        slow_L = np.array([_slow_variance(n, phi) for n in lengths_L]) / variance_L
        for white, slow in _split(white_L, slow_L):
            miss = float(np.sum((white * white_L + slow * slow_L - 1) ** 2))
            if miss < smallest_miss - 1e-12:
                smallest_miss = miss
                best = Noise(math.sqrt(white), math.sqrt(slow), phi if slow else 0.0)
    return best


def _split(white_L: Array, slow_L: Array) -> list[tuple[float, float]]:
    """Variances of the two parts with the least squares, neither below 0."""
    ww, ws, ss = white_L @ white_L, white_L @ slow_L, slow_L @ slow_L
    w, s = white_L.sum(), slow_L.sum()
    splits = [(float(w / ww), 0.0)]
    if ss > 0:
        splits.append((0.0, float(s / ss)))
        determinant = ww * ss - ws * ws
        if determinant > 1e-9 * ww * ss:
            white, slow = (w * ss - s * ws) / determinant, (s * ww - w * ws) / determinant
            if white > 0 and slow > 0:
                splits.append((float(white), float(slow)))
    return splits
