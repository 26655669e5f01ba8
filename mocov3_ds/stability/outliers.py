"""Which values stand out of their past, so seldom by chance that a run of any length stays quiet?

A value counts by its deviations from the level of its past. How many it must have depends on how
heavy the tails of the noise are: that is read off the noise itself, as the number of degrees of a
Student's t whose quantiles lie as far apart, and extrapolated to one false alarm in a hundred runs.
Several rows in a row need fewer deviations each, as independent noise seldom repeats itself; noise
that remembers does, so they need less only by as much as it forgets. For the same reason rows far
out in a row are no noise, and no part of its tails: six bursts in 400 rows would else pass for
heavy tails and hide themselves.

Shape suffix: T = rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import special

from mocov3_ds.monitoring.medians import at_ranks, median_of
from mocov3_ds.stability.findings import Array, Flags
from mocov3_ds.stability.trailing import MAD_TO_DEVIATION, TrailingLevel, TrailingNoise

FALSE_ALARMS = 0.01
"""false alarms of a detector per quiet run"""
DEVIATIONS = 6.0
"""fewest deviations of a value that stands out, where noise is Gaussian"""
FAR_TAILS, HEAVY = 0.8, 4.0
"""tails lighter than those of a t of `HEAVY` degrees count as heavier by this share farther out
than they are read: those of a sum of noises are"""
LIGHTER_OUTWARD, FAR_CHANCE, EXPONENTIAL_MARGIN = 1.2, 1e-6, 1.2
"""a skewed tail that is so many times as light far out as nearer falls exponentially: it counts as
the t that reaches as far, and by a margin farther, at such a chance"""
LONGEST_BURST = 100
"""rows in a row that stand out after which the new level counts as the usual one"""
LONGEST_RUN = 4
"""rows in a row beyond which more of them prove no more"""
CLUSTER = 3.0
"""deviations beyond which rows in a row are a burst, and left out where the tails are read"""
_DEGREES = np.array([2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 40.0])
_SHARES = (0.995, 0.98, 0.95)
_FEWEST_BEYOND = 5  # values farther out than the farthest quantile of the lower tail
_FEWEST_TO_COMPARE = 2  # and of the upper one, which is but compared
_PASSES = 10  # each finds 15 rows more of a long burst; most series need one or two


def limits(deviations_T: Array, series: int = 1, degrees: float = math.inf) -> Array:
    """Deviations that one, two, ... `LONGEST_RUN` rows in a row must all have, (LONGEST_RUN,).

    Args:
        deviations_T: deviations of all rows from their past, (T,), NaN where there is no past.
        series: number of series that are looked at in one run.
        degrees: tails count as heavy as those of a Student's t of so many degrees, at least.
    """
    deviations_T = deviations_T[np.isfinite(deviations_T)]
    degrees = min(degrees, tail_degrees(without_bursts(deviations_T)))
    degrees = min(degrees, max(FAR_TAILS * degrees, HEAVY))
    # what the next row does anyway proves nothing
    independent = 1 + np.arange(LONGEST_RUN) * (1 - correlation_with_next(deviations_T))
    chance = (FALSE_ALARMS / (series * max(len(deviations_T), 1))) ** (1 / independent)
    if np.isinf(degrees):
        limit = -special.ndtri(chance)
    else:
        limit = special.stdtrit(degrees, 1 - chance) * _to_deviations(degrees)
    return np.maximum(limit, DEVIATIONS)


def correlation_with_next(deviations_T: Array) -> float:
    """How far a row goes with the next one, 0 to 1: by their signs, which bursts hardly change.

    For Gaussian values the correlation; 0 where chance alone makes as much.
    """
    pairs = len(deviations_T) - 1
    if pairs < 20:
        return 0.0
    above_T = deviations_T > median_of(deviations_T)
    same = float(np.mean(above_T[1:] == above_T[:-1])) - 1 / math.sqrt(pairs)  # two standard errors
    return max(math.sin(math.pi * (same - 0.5)), 0.0)


def without_bursts(deviations_T: Array) -> Array:
    """The values without those of several rows in a row beyond `CLUSTER`, (at most T,).

    Rows far below their level in a row are a new level that the past does not know yet.
    """
    burst_T = in_a_row(deviations_T > CLUSTER, 2)
    return deviations_T[~(burst_T | in_a_row(deviations_T < -CLUSTER, LONGEST_RUN))]


def tail_degrees(deviations_T: Array) -> float:
    """Degrees of the Student's t with tails as heavy as these; infinite for Gaussian ones or light.

    The upper tail is read less far out than the lower one, where no events are. Where the lower one
    is light, and the upper one gets lighter outward, it falls exponentially: the degrees are those
    of the t that reaches as far.
    """
    if len(deviations_T) < 20:
        return float("inf")
    middle = median_of(deviations_T)
    half = median_of(np.abs(deviations_T - middle))
    if half == 0:
        return float("inf")
    below = int(np.count_nonzero(deviations_T <= middle))
    above = int(np.count_nonzero(deviations_T >= middle))
    side_below = [middle - value for value in at_ranks(deviations_T, _values_beyond(below))]
    last = len(deviations_T) - 1
    side_above = [
        value - middle
        for value in at_ranks(deviations_T, [last - beyond for beyond in _values_beyond(above)])
    ]
    readings = [
        _degrees_at(far / half, count, share)
        for count, side in ((below, side_below), (above, side_above))
        for share, far in zip(_SHARES, side, strict=True)
    ]
    low, high = readings[: len(_SHARES)], readings[len(_SHARES) :]
    enough = below * (1 - _SHARES[0]) >= _FEWEST_BEYOND
    lower = min(low if enough else low[1:])
    # skewed noise has few values far out above, which matter; bursts are no part of it
    upper = max(high[1:])
    comparable = math.isinf(lower) and above * (1 - _SHARES[0]) >= _FEWEST_TO_COMPARE
    if comparable and LIGHTER_OUTWARD * high[-1] <= high[0] < math.inf:
        upper = max(upper, _degrees_of_exponential([value / half for value in side_above]))
    return min(lower, upper)


def _degrees_of_exponential(quantiles: Sequence[float]) -> float:
    """Degrees of the t that reaches as far as tails that fall exponentially from `_SHARES` on."""
    slope = (quantiles[0] - quantiles[-1]) / math.log((1 - _SHARES[-1]) / (1 - _SHARES[0]))
    far = quantiles[1] + slope * math.log((1 - _SHARES[1]) / FAR_CHANCE)
    return float(np.interp(-EXPONENTIAL_MARGIN * far, -_ratios(1 - FAR_CHANCE)[0], _DEGREES))


def _values_beyond(count: int) -> list[int]:
    """How many of the values of a side are farther out than its quantiles at `_SHARES`."""
    return [count - 1 - round(share * (count - 1)) for share in _SHARES]


def _degrees_at(ratio: float, count: int, share: float) -> float:
    """Degrees at which a quantile of absolute values of a t over their median is a ratio.

    Args:
        ratio: such a quantile of the values over their median.
        count: number of the values.
        share: which quantile it is.
    """
    ratios, gaussian = _ratios(share)
    # noise of the quantile itself: a Gaussian sample shall count as one
    slack = 1 + 2 * gaussian_error(share, count)
    return math.inf if ratio <= gaussian * slack else float(np.interp(-ratio, -ratios, _DEGREES))


def gaussian_error(share: float, count: float) -> float:
    """Relative standard error of such a quantile of so many absolute Gaussian values."""
    quantile = special.ndtri((1 + share) / 2)
    density = 2 * np.exp(-(quantile**2) / 2) / np.sqrt(2 * np.pi)
    return float(np.sqrt(share * (1 - share) / max(count, 1)) / density / quantile)


@cache
def _ratios(share: float) -> tuple[Array, float]:
    """Such a quantile over the median, of absolute t values of each degree; of Gaussian ones."""
    quantiles = special.stdtrit(_DEGREES, (1 + share) / 2)
    return (
        quantiles / special.stdtrit(_DEGREES, 0.75),
        float(special.ndtri((1 + share) / 2) / special.ndtri(0.75)),
    )


def _to_deviations(degrees: float) -> float:
    """Robust standard deviations in one unit of a Student's t."""
    return float(special.ndtri(0.75) / special.stdtrit(degrees, 0.75))


def in_a_row(above_T: Flags, length: int) -> Flags:
    """Rows that belong to a stretch of at least so many true ones, (T,)."""
    flags_T = np.zeros(len(above_T), bool)
    if length <= len(above_T) and above_T.any():
        begins = len(above_T) - length + 1
        whole: Flags = np.logical_and.reduce([above_T[a : a + begins] for a in range(length)])
        for shift in range(length):
            flags_T[shift : shift + len(whole)] |= whole
    return flags_T


@dataclass(frozen=True)
class Past:
    """What a row is compared with.

    Attributes:
        window: values before a row whose median is its level.
        spread_window: values before a row whose deviations from their levels tell the noise.
        at_least: fewest values of the past.
        smallest_spread: least standard deviation of the noise.
    """

    window: int
    spread_window: int
    at_least: int
    smallest_spread: float


class Comparison:
    """Compares the rows of a series with their past, once, or again with other usual values.

    Args:
        past: how much of the past counts.
    """

    def __init__(self, past: Past) -> None:
        self._past = past
        self._levels = TrailingLevel(past.window, past.at_least)
        self._noise = TrailingNoise(past.spread_window, past.at_least)

    def take(self, values_T: Array, usual_T: Array) -> tuple[Array, Array, Array]:
        """Level of the past of each row, its deviations from that, and one deviation, (T,) each.

        Args:
            values_T: finite values of one series, (T,).
            usual_T: the same where they are usual, what is usual elsewhere, (T,): what counts as
                past.
        """
        past = self._past
        level_T = self._levels.take(usual_T)
        known_T = np.where(np.isnan(level_T), 0.0, usual_T - level_T)
        begin = min(past.at_least, len(known_T))
        spread_T, offset_T = np.full((2, len(values_T)), np.nan)
        offset_T[begin:], spread_T[begin:] = self._noise.take(known_T[begin:])
        first = spread_T[np.isfinite(spread_T)][:1]
        if len(first):  # the first levels have no spread of their own yet
            spread_T[begin : begin + past.at_least] = first[0]
        # a level lags behind a falling series, and no row stands out or in for that
        lag_T = np.minimum(np.nan_to_num(offset_T), 0.0)
        deviation_T = np.maximum(spread_T, past.smallest_spread)
        return level_T, (values_T - level_T - lag_T) / deviation_T, deviation_T


def common_tails(values: Sequence[Array], past: Past) -> float:
    """Degrees of the tails of all series together, which say more than a short one of them."""
    deviations = [Comparison(past).take(values_T, values_T)[1] for values_T in values]
    pooled = [without_bursts(one[np.isfinite(one)]) for one in deviations]
    return tail_degrees(np.concatenate(pooled)) if pooled else math.inf


def stand_out(
    values_T: Array, past: Past, smallest: Array, *, series: int = 1, degrees: float = math.inf
) -> tuple[Flags, Array]:
    """Rows that stand out above their past, (T,), and how far above its level each row is, (T,).

    Rows that stand out do not count as the past of others, up to `LONGEST_BURST` of them in a row.

    Args:
        values_T: finite values of one series, (T,).
        past: what a row is compared with.
        smallest: how far above the level one, two, ... rows in a row must be, (LONGEST_RUN,).
        series: number of series that are looked at in one run.
        degrees: the noise counts as having tails of so many degrees of a Student's t, at most.
    """
    usual_T = values_T
    flags_T = np.zeros(len(values_T), bool)
    comparison = Comparison(past)
    half_T = np.where(np.arange(len(values_T)) % 2, 1, -1) / MAD_TO_DEVIATION
    for _ in range(_PASSES):
        level_T, deviations_T, deviation_T = comparison.take(values_T, usual_T)
        excess_T = values_T - level_T
        found_T = np.zeros(len(values_T), bool)
        limit = limits(deviations_T, series, degrees)
        for length, (deviations, least) in enumerate(zip(limit, smallest, strict=True), 1):
            with np.errstate(invalid="ignore"):
                above_T = (deviations_T >= deviations) & (excess_T > least)
            found_T |= in_a_row(above_T, length)
        if np.array_equal(found_T, flags_T):
            break
        flags_T = found_T
        # in their stead counts what leaves the level and the noise of later rows as they are
        burst_T = _at_most(flags_T, LONGEST_BURST)
        usual_T = np.where(burst_T, level_T + half_T * deviation_T, values_T)
    return flags_T, excess_T


def _at_most(flags_T: Flags, count: int) -> Flags:
    """The first `count` rows of each stretch of flagged rows."""
    if not flags_T.any():
        return flags_T
    row_T = np.arange(len(flags_T))
    begins_T = np.maximum.accumulate(np.where(flags_T & ~np.r_[False, flags_T[:-1]], row_T, 0))
    limited: Flags = flags_T & (row_T - begins_T < count)
    return limited
