"""How heavy are the tails of a k-NN curve's noise? Read off what no dip makes: lone high values.

An evaluation rises alone where it is above the second highest of its four neighbours. A dip's
edges, a dip of one evaluation and a step up have no such values, so they do not count as tails;
noise has as many above as below. How far out the farthest lone rises are, over their median, tells
the degrees of the Student's t that the noise is as heavy-tailed as.

Shape suffix: K = k-NN evaluations.
"""

import math
from functools import cache

import numpy as np
from scipy import special

from mocov3_ds.stability.findings import Array

FEWEST_FOR_TAILS = 200
"""evaluations below which noise counts as Gaussian: Gaussian noise would often seem heavy-tailed"""
SHARES = (0.95, 0.98)
"""quantiles of the lone rises that are read"""
_INVERSE_DEGREES = 1 / np.array([math.inf, 40, 20, 12, 8, 6, 5, 4, 3, 2.5, 2])


def curve_degrees(knn_K: Array) -> float:
    """Degrees of the Student's t with tails as heavy as those of the curve's noise.

    Infinite for Gaussian noise and lighter, and for a curve too short to tell.
    """
    if len(knn_K) < FEWEST_FOR_TAILS:
        return math.inf
    rises = lone_rises(knn_K)
    rises = rises[rises > 0]
    if len(rises) < FEWEST_FOR_TAILS // 5:
        return math.inf
    ratios = np.quantile(rises, SHARES) / np.median(rises)
    inverse = [
        np.interp(ratio, expected, _INVERSE_DEGREES)
        for ratio, expected in zip(ratios, _expected_ratios(), strict=True)
    ]
    heaviness = float(np.mean(inverse))
    return 1 / heaviness if heaviness else math.inf


def lone_rises(knn_K: Array) -> Array:
    """How far each evaluation is above the second highest of its four neighbours, (K - 4,)."""
    around_K = [knn_K[:-4], knn_K[1:-3], knn_K[3:-1], knn_K[4:]]
    rises_K: Array = knn_K[2:-2] - np.sort(around_K, axis=0)[2]
    return rises_K


def as_gaussian(deviations_K: Array, degrees: float) -> Array:
    """Deviations of such tails, (K,), each moved to where Gaussian ones are as seldom.

    Args:
        deviations_K: deviations in any unit, heavy-tailed, around 0.
        degrees: their degrees of a Student's t; the median of their absolute values stays.
    """
    if math.isinf(degrees):
        return deviations_K
    half = float(np.median(np.abs(deviations_K)))
    if half == 0:
        return deviations_K
    chance_K = special.stdtr(degrees, -np.abs(deviations_K) / half * special.stdtrit(degrees, 0.75))
    moved_K: Array = np.copysign(-special.ndtri(chance_K), deviations_K)
    return moved_K * half / float(special.ndtri(0.75))


@cache
def _expected_ratios() -> tuple[Array, ...]:
    """Each quantile of `SHARES` over the median of the lone rises of noise of each degree."""
    ratios = [_ratios_of(1 / inverse if inverse else math.inf) for inverse in _INVERSE_DEGREES]
    return tuple(np.array(column) for column in zip(*ratios, strict=True))


def _ratios_of(degrees: float) -> list[float]:
    """Quantiles of positive x - x(3:4), of independent values, over their median.

    P(x - x(3:4) > r) is the mean over x of 4 F(x - r)^3 - 3 F(x - r)^4.
    """
    chances = (np.arange(400) + 0.5) / 400
    inverse = special.ndtri(chances) if math.isinf(degrees) else special.stdtrit(degrees, chances)
    rises = np.r_[0, np.geomspace(0.3, 20, 50)]
    apart = inverse - rises[:, None]
    below = special.ndtr(apart) if math.isinf(degrees) else special.stdtr(degrees, apart)
    beyond = np.mean(4 * below**3 - 3 * below**4, axis=1)
    found = 1 - beyond / beyond[0]
    median = float(np.interp(0.5, found, rises))
    return [float(np.interp(share, found, rises)) / median for share in SHARES]
