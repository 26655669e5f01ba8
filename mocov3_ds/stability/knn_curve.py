"""What does a k-NN curve show: dips, smooth declines, and how much accuracy-time they cost?

What falls by more than the curve's own noise (`drops`) is followed from where the fall begins to
where the accuracy is back. Sudden falls are dips, slow and long ones declines. A fall from the
level of the random network, in the warm-up, is neither.

Accuracies and depths are in percent points. Shape suffixes: K = k-NN evaluations, F = falls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.stability.drops import MOST_BEFORE, Drop, find_drops, find_single_drops
from mocov3_ds.stability.findings import Array, Decline, Dip, Flags, Series, Steps
from mocov3_ds.stability.knn_noise import Noise, estimate_noise

SMALLEST_FALL = 1.0
"""a dip or decline is at least this many points deep: the paper's instability costs 1 to 3"""
SUDDEN = 0.03
"""a fall within this share of the run (or three evaluations) is sudden"""
RESTART_DEPTH = 0.20
"""a restart, the paper's big dip, loses this share of the accuracy at once, by more than noise adds
to the lowest of some evaluations"""
LOWEST_ERRORS = 2.0
"""standard errors that the lowest of some evaluations is too low"""
RESTART_FOR = 0.02
"""and is not made good for this share of the run"""
DECLINE_FOR = 0.05
"""a slow fall is a decline if accuracy is lost for this share of the run"""
BEGUN = 0.2
"""share of its depth at which a fall has begun"""
FALLEN = 0.8
"""share of its depth at which it has fallen"""
HEALED = 0.25
"""share of its depth below the level at which a fall is made good"""
WARM_UP = 0.15
"""share of the run, at least, in which accuracy may fall from the random network's level"""
RANDOM_SHARE = 0.75
"""share of the best accuracy that a random network has at most, where its own is not known"""
_RESOLUTION = 4.0  # a curve is smoothed until a fall is so many standard errors deep
_WIDE_RESOLUTION, _WIDE = 20.0, 8  # a wide one so many, over at most this part of its width


@dataclass(frozen=True)
class Fall:
    """A fall by the indices of its evaluations, its level and its depth in points.

    Attributes:
        first: first evaluation below the level.
        fallen: first one with most of the depth.
        lowest: the deepest one.
        last: the one that makes it good, or the last of the run.
        level: accuracy before it.
        depth: points lost.
        closed: whether the accuracy came back.
        sudden: whether it fell within a few evaluations.
        error: standard error in points of its lowest level.
    """

    first: int
    fallen: int
    lowest: int
    last: int
    level: float
    depth: float
    closed: bool
    sudden: bool
    error: float = 0.0


@dataclass(frozen=True)
class CurveFindings:
    """What a k-NN curve shows.

    Attributes:
        noise: noise of the curve.
        dips: sudden falls, and short ones, by first step.
        declines: slow long ones, by first step.
        lost: I, the share of accuracy-time lost to them, in percent; NaN without evaluations.
    """

    noise: Noise
    dips: tuple[Dip, ...]
    declines: tuple[Decline, ...]
    lost: float


def smooth_curve(knn_K: Array) -> Array:
    """Median of three (two at the ends), (K,): one odd evaluation is not the best accuracy."""
    if len(knn_K) < 3:
        return np.array([np.median(knn_K)] * len(knn_K))
    middle = np.median(np.lib.stride_tricks.sliding_window_view(knn_K, 3), axis=1)
    ends = np.median(knn_K[:2]), np.median(knn_K[-2:])
    return np.concatenate([[ends[0]], middle, [ends[1]]])


def best_and_final_accuracy(series: Series) -> tuple[float, float]:
    """Best 3-point median, and median of the last three evaluations; NaN without evaluations."""
    if len(series.knn_K) == 0:
        return math.nan, math.nan
    return float(np.max(smooth_curve(series.knn_K))), final_accuracy(series.knn_K)


def final_accuracy(knn_K: Array) -> float:
    """Median of the last three evaluations; NaN without evaluations."""
    return float(np.median(knn_K[-3:])) if len(knn_K) else math.nan


def examine_curve(series: Series) -> CurveFindings:
    """Find the dips and declines of a run's k-NN curve, and what they cost.

    Args:
        series: the run; its evaluations ascend.
    """
    noise = estimate_noise(series.knn_K, series.probes)
    falls = find_falls(series, noise)
    long = DECLINE_FOR * series.total_steps
    slow = [fall for fall in falls if not fall.sudden and _duration(series, fall) > long]
    return CurveFindings(
        noise,
        dips=tuple(_as_dip(series, fall) for fall in falls if fall not in slow),
        declines=tuple(_as_decline(series, fall) for fall in slow),
        lost=_lost_share(series, falls),
    )


def find_falls(series: Series, noise: Noise) -> list[Fall]:
    """Falls of the curve by first evaluation, those from the random network's level left out.

    Sudden ones are looked for first. Each fall is taken out of the curve before the next is looked
    for, so that a row of dips is no decline.
    """
    falls: list[Fall] = []
    left = np.arange(len(series.knn_K))  # evaluations that belong to no fall yet
    knn_K = series.knn_K.astype(float).copy()  # without what earlier falls lost for good
    for only_sudden in (True, False):
        while True:
            fall = _next_fall(series, noise, left, knn_K, only_sudden)
            if fall is None:
                break
            if not _is_from_random(series, noise, fall):
                falls.append(fall)
            fallen = fall.fallen if fall.sudden else fall.lowest
            resume = fall.last if fall.closed else fallen + 1
            claimed = (left >= fall.first) & (left < resume)
            later_K = knn_K[left[left >= resume][:MOST_BEFORE]]
            if len(later_K):
                knn_K[resume:] += max(fall.level - float(np.mean(later_K)), 0.0)
            left = left[~claimed]
    return sorted(falls, key=lambda fall: fall.first)


def _next_fall(
    series: Series, noise: Noise, left: Steps, knn_K: Array, only_sudden: bool
) -> Fall | None:
    """The clearest fall of the evaluations that are left."""
    narrow = max(MOST_BEFORE, round(2 * SUDDEN * len(left)))
    drops = find_drops(knn_K[left], noise, narrow if only_sudden else None)
    if only_sudden:
        drops = [*find_single_drops(knn_K[left], noise), *drops]
    dismissed = np.zeros(len(left) + 1, bool)
    for drop in drops:
        if dismissed[drop.at]:
            continue
        fall = _follow(drop, left, knn_K[left], series, noise)
        if fall.depth >= SMALLEST_FALL and (fall.sudden or not only_sudden):
            return fall
        begin = max(int(np.searchsorted(left, fall.first)) - drop.width, 0)
        dismissed[begin : max(int(np.searchsorted(left, fall.lowest)), drop.at) + 1] = True
    return None


def _follow(drop: Drop, left: Steps, knn_K: Array, series: Series, noise: Noise) -> Fall:
    """Where the fall of a drop begins, how deep it gets, and where it is made good."""
    steps_K = series.knn_steps_K[left]
    smoothing = max(
        _smoothing_for(_RESOLUTION, drop, noise),
        min(_smoothing_for(_WIDE_RESOLUTION, drop, noise), drop.width // _WIDE),
    )
    smooth_K = _moving_mean(knn_K, smoothing)
    level = _level_before(drop, knn_K)
    back = _first_true(smooth_K[drop.at + 1 :] >= level - HEALED * drop.depth, drop.at + 1)
    lowest = drop.at + int(np.argmin(smooth_K[drop.at : back]))
    depth = level - float(smooth_K[lowest])
    high_K = np.flatnonzero(smooth_K[: lowest + 1] > level - BEGUN * depth)
    first = int(high_K[-1]) + 1 if len(high_K) else 0
    first = min(first, lowest)
    fallen = _first_true(smooth_K[first:] <= level - FALLEN * depth, first)
    last = _first_true(smooth_K[lowest + 1 :] >= level - HEALED * depth, lowest + 1)
    spacing = float(np.median(np.diff(steps_K))) if len(steps_K) > 1 else 0.0
    fallen = min(fallen, lowest)
    took = steps_K[fallen] - steps_K[max(first - 1, 0)] - (smoothing - 1) * spacing
    sudden = bool(took <= max(3 * spacing, SUDDEN * series.total_steps))
    if not sudden:  # where it was at its level last
        high_K = np.flatnonzero(smooth_K[:first] >= level)
        first = int(high_K[-1]) + 1 if len(high_K) else first
    return Fall(
        first=int(left[first]),
        fallen=int(left[fallen]),
        lowest=int(left[lowest]),
        last=int(left[min(last, len(left) - 1)]),
        level=level,
        depth=depth,
        closed=last < len(left),
        sudden=sudden,
        error=noise.of_mean(smoothing),
    )


def _smoothing_for(resolution: float, drop: Drop, noise: Noise) -> int:
    """Evaluations of a mean of which a drop is so many standard errors deep, at most its width."""
    odd = range(1, drop.width, 2)
    return next((n for n in odd if noise.of_mean(n) * resolution <= drop.depth), drop.width)


def _level_before(drop: Drop, knn_K: Array) -> float:
    """Highest mean of so many evaluations as tell the level, up to where the drop was seen."""
    if drop.width == 1:
        return drop.depth + float(knn_K[drop.at])
    sums = np.concatenate([[0.0], np.cumsum(knn_K)])
    ends = np.arange(max(drop.before, drop.at - 2 * drop.width), drop.at + 1)
    return float(np.max((sums[ends] - sums[ends - drop.before]) / drop.before))


def _moving_mean(values_K: Array, count: int) -> Array:
    """Mean of `count` values around each one, of fewer at the ends, (K,)."""
    if count == 1:
        return values_K
    ones = np.ones(count)
    mean_K: Array = np.convolve(values_K, ones, "same") / np.convolve(
        np.ones(len(values_K)), ones, "same"
    )
    return mean_K


def _first_true(flags: Flags, offset: int) -> int:
    """Index of the first true one, after so many others; past the end where there is none."""
    return offset + (int(np.argmax(flags)) if flags.any() else len(flags))


def _is_from_random(series: Series, noise: Noise, fall: Fall) -> bool:
    """Whether a fall begins in the warm-up, from a level no higher than the random network's.

    Such a fall is made good. Where the random network's accuracy is not known, it is that of the
    first evaluations, if the run ends well above them.
    """
    if not fall.closed:
        return False
    lr_T = np.nan_to_num(series.lr_T)
    peak = int(series.steps_T[np.argmax(lr_T)]) if len(lr_T) else 0
    if series.knn_steps_K[fall.first] > max(WARM_UP * series.total_steps, peak):
        return False
    smooth_K = smooth_curve(series.knn_K)
    random = float(np.max(smooth_K[:3]))
    if series.random_knn is not None:
        random = max(random, series.random_knn)
    elif random > RANDOM_SHARE * np.max(smooth_K):
        return False
    return fall.level <= random + 2 * noise.deviation


def _duration(series: Series, fall: Fall) -> int:
    """Steps from the last evaluation before a fall to the one that made it good."""
    return int(series.knn_steps_K[fall.last] - series.knn_steps_K[max(fall.first - 1, 0)])


def _lost_areas(series: Series, fall: Fall) -> Array:
    """Point-steps below the level at each evaluation of a fall, (K,); 0 at the others."""
    areas_K = np.zeros(len(series.knn_K))
    span = slice(fall.first, fall.last + (not fall.closed))
    dt_K = np.diff(series.knn_steps_K, prepend=0)
    areas_K[span] = (fall.level - series.knn_K[span]) * dt_K[span]
    return areas_K


def _as_dip(series: Series, fall: Fall) -> Dip:
    steps_K = series.knn_steps_K
    relative = fall.depth / fall.level if fall.level > 0 else 0.0
    surely = fall.depth - LOWEST_ERRORS * fall.error > RESTART_DEPTH * fall.level
    long = _duration(series, fall) > RESTART_FOR * series.total_steps
    return Dip(
        first=int(steps_K[fall.first]),
        last=int(steps_K[fall.last]),
        lowest=int(steps_K[fall.lowest]),
        depth=fall.depth,
        relative_depth=relative,
        area=max(float(_lost_areas(series, fall).sum()), 0.0),
        closed=fall.closed,
        sudden=fall.sudden,
        restart=fall.sudden and surely and long,
    )


def _as_decline(series: Series, fall: Fall) -> Decline:
    steps_K = series.knn_steps_K
    return Decline(int(steps_K[fall.first]), int(steps_K[fall.lowest]), fall.depth)


def _lost_once(series: Series, falls: Sequence[Fall]) -> float:
    """Point-steps that falls cost together: where they overlap, the deeper one counts."""
    if not falls:
        return 0.0
    areas_FK = np.stack([_lost_areas(series, fall) for fall in falls])
    deepest_K = areas_FK[np.argmax(np.abs(areas_FK), axis=0), np.arange(areas_FK.shape[1])]
    return max(float(deepest_K.sum()), 0.0)


def _lost_share(series: Series, falls: Sequence[Fall]) -> float:
    """I: accuracy-time lost to falls that are none of noise, so a quiet run of any length has 0.

    After a run stopped at a value that was not finite, accuracy counts as chance to the planned
    end.
    """
    steps_K, knn_K = series.knn_steps_K, series.knn_K
    if len(knn_K) == 0:
        return math.nan
    kept_area = float(np.sum(knn_K * np.diff(steps_K, prepend=0)))
    lost_area = _lost_once(series, falls)
    if series.stopped_non_finite and series.total_steps > steps_K[-1]:
        steps_left = float(series.total_steps - steps_K[-1])
        best = float(np.max(smooth_curve(knn_K)))
        chance = min(series.knn_chance, float(knn_K[-1]))
        kept_area += chance * steps_left
        lost_area += (best - chance) * steps_left
    return 100 * lost_area / (kept_area + lost_area) if kept_area + lost_area > 0 else math.nan
