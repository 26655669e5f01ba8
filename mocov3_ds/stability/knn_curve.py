"""What does a k-NN curve show: dips, smooth declines, and how much accuracy-time they cost?

Accuracies and depths are in percent points. Shape suffixes: K = k-NN evaluations, T = steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.stability.events import Excursion
from mocov3_ds.stability.findings import Array, Decline, Dip, Series, Steps

SMALLEST_DIP = 1.0
"""a dip is at least this many points deep"""
DIP_SIGMAS = 4.0
"""and this many binomial errors of the probes"""
SUDDEN = 0.03
"""a fall within this share of the run (or three evaluations) is sudden"""
RESTART_DEPTH = 0.30
"""a restart loses this share of the best accuracy at once"""
RESTART_FOR = 0.02
"""and stays open for this share of the run"""
DECLINE_FOR = 0.05
"""a smooth drawdown is a decline if it stays open for this share of the run"""
TREND_WINDOW = 0.10
"""so is a significant falling trend over this share of the run"""
TREND_P = 0.01
"""Mann-Kendall's p of that trend, divided by the number of windows that fit into the run"""
LR_TAIL = 0.10
"""trends are looked for until the learning rate has fallen to this share of its peak"""
_FEWEST_FOR_TREND = 8


@dataclass(frozen=True)
class Drawdown:
    """A dip by the indices of its evaluations.

    Attributes:
        first: index of the evaluation that opens it.
        lowest: index of the deepest evaluation.
        last: index of the evaluation that ends it.
        closed: whether the accuracy came back.
        sudden: whether it fell within a few evaluations instead of sliding slowly.
    """

    first: int
    lowest: int
    last: int
    closed: bool
    sudden: bool


def smooth_curve(knn_K: Array) -> Array:
    """Median of three (two at the ends), (K,): one odd evaluation is no dip."""
    return np.array([np.median(knn_K[max(i - 1, 0) : i + 2]) for i in range(len(knn_K))])


def binomial_error(accuracy: Array | float, probes: int) -> Array:
    """Standard error in points of an accuracy in percent on so many images; 0 if unknown."""
    p = np.clip(np.asarray(accuracy, float) / 100, 0.0, 1.0)
    return 100 * np.sqrt(p * (1 - p) / probes) if probes else np.zeros_like(p)


def dip_threshold(best: Array | float, probes: int) -> Array:
    """Points below `best` from which on a drawdown is a dip."""
    return np.maximum(SMALLEST_DIP, DIP_SIGMAS * binomial_error(best, probes))


def best_and_final_accuracy(series: Series) -> tuple[float, float]:
    """Best 3-point median, and median of the last three evaluations; NaN without evaluations."""
    if len(series.knn_K) == 0:
        return math.nan, math.nan
    return float(np.max(smooth_curve(series.knn_K))), float(np.median(series.knn_K[-3:]))


def instability(series: Series) -> float:
    """I, the share of accuracy-time lost to dips, in percent; NaN without evaluations.

    After a run stopped at a value that was not finite, accuracy counts as chance to the planned
    end.
    """
    steps_K, accuracy_K = series.knn_steps_K, smooth_curve(series.knn_K)
    if len(accuracy_K) == 0:
        return math.nan
    if series.stopped_non_finite and series.total_steps > steps_K[-1]:
        steps_K = np.append(steps_K, series.total_steps)
        chance = min(series.knn_chance, float(accuracy_K[-1]))
        accuracy_K = np.append(accuracy_K, chance)
    best_K = np.maximum.accumulate(accuracy_K)
    dt_K = np.diff(steps_K, prepend=0).astype(float)
    lost_K = best_K - accuracy_K - 2 * binomial_error(best_K, series.probes)
    best_area = float(np.sum(best_K * dt_K))
    lost_area = float(np.sum(np.maximum(lost_K, 0.0) * dt_K))
    return 100 * lost_area / best_area if best_area else math.nan


def find_dips(series: Series) -> tuple[Dip, ...]:
    """Dips of the smoothed curve, by first step."""
    steps_K, accuracy_K = series.knn_steps_K, smooth_curve(series.knn_K)
    best_K = np.maximum.accumulate(accuracy_K) if len(accuracy_K) else accuracy_K
    below_K = best_K - accuracy_K
    dt_K = np.diff(steps_K, prepend=0)
    dips = []
    for drawdown in find_drawdowns(steps_K, series.knn_K, series.probes, series.total_steps):
        span = slice(drawdown.first, drawdown.last + 1)
        depth = float(below_K[drawdown.lowest])
        relative = depth / float(best_K[drawdown.lowest])
        first, last = int(steps_K[drawdown.first]), int(steps_K[drawdown.last])
        is_long = last - first > RESTART_FOR * series.total_steps
        dips.append(
            Dip(
                first=first,
                last=last,
                lowest=int(steps_K[drawdown.lowest]),
                depth=depth,
                relative_depth=relative,
                area=float(np.sum(below_K[span] * dt_K[span])),
                closed=drawdown.closed,
                sudden=drawdown.sudden,
                restart=drawdown.sudden and relative > RESTART_DEPTH and is_long,
            )
        )
    return tuple(dips)


def find_drawdowns(steps_K: Steps, knn_K: Array, probes: int, total_steps: int) -> list[Drawdown]:
    """Dips of a curve that is not yet smoothed: open above the threshold, closed below half."""
    accuracy_K = smooth_curve(knn_K)
    best_K = np.maximum.accumulate(accuracy_K) if len(accuracy_K) else accuracy_K
    down_K, limit_K = best_K - accuracy_K, dip_threshold(best_K, probes)
    drawdowns, first = [], 0
    while first < len(accuracy_K):
        if down_K[first] <= limit_K[first]:
            first += 1
            continue
        last = first
        while last + 1 < len(accuracy_K) and down_K[last] >= limit_K[last] / 2:
            last += 1
        closed = bool(down_K[last] < limit_K[last] / 2)
        lowest = first + int(np.argmax(down_K[first : last + 1]))
        start = int(np.flatnonzero(down_K[: first + 1] < limit_K[first] / 2)[-1])
        fallen = first + int(np.argmax(down_K[first:] >= 0.8 * down_K[lowest]))
        three = 3 * float(np.median(np.diff(steps_K))) if len(steps_K) > 1 else 0.0
        sudden = steps_K[fallen] - steps_K[start] <= max(three, SUDDEN * total_steps)
        drawdowns.append(Drawdown(first, lowest, last, closed, bool(sudden)))
        first = last + 1
    return drawdowns


def find_declines(
    series: Series, dips: Sequence[Dip], bursts: Sequence[Excursion]
) -> tuple[Decline, ...]:
    """Long smooth dips, and significant falling trends, without a gradient event inside."""
    slides = [
        Decline(dip.first, dip.lowest, dip.depth, math.nan)
        for dip in dips
        if not dip.sudden
        and dip.last - dip.first > DECLINE_FOR * series.total_steps
        and not _has_burst(bursts, dip.first, dip.lowest, series)
    ]
    trends = [
        trend
        for trend in _find_trends(series)
        if not any(trend.first <= slide.last and slide.first <= trend.last for slide in slides)
        and not _has_burst(bursts, trend.first, trend.last, series)
    ]
    return tuple(sorted(slides + trends, key=lambda decline: decline.first))


def _has_burst(bursts: Sequence[Excursion], first: int, last: int, series: Series) -> bool:
    """Whether a gradient event lies in a fall, or shortly before it began."""
    earliest = first - DECLINE_FOR * series.total_steps
    return any(earliest <= burst.first <= last for burst in bursts)


def _find_trends(series: Series) -> list[Decline]:
    """Windows of a tenth of the run in which the accuracy itself, not its median, falls."""
    steps_K, knn_K = series.knn_steps_K, series.knn_K
    width = TREND_WINDOW * series.total_steps
    tail = _tail_start(series)
    trends: list[Decline] = []
    for start in range(len(steps_K)):
        end = int(np.searchsorted(steps_K, steps_K[start] + width, side="right"))
        window_K, third = knn_K[start:end], (end - start) // 3
        if end == len(steps_K) and steps_K[-1] - steps_K[start] < 0.9 * width:
            break
        if steps_K[end - 1] > tail or third < 2:
            continue
        fall = float(np.mean(window_K[:third]) - np.mean(window_K[-third:]))
        if fall < float(dip_threshold(float(np.max(window_K)), series.probes)) / 2:
            continue
        p = mann_kendall(window_K)
        if p >= TREND_P * TREND_WINDOW:
            continue
        trend = Decline(int(steps_K[start]), int(steps_K[end - 1]), fall, p)
        if trends and trend.first <= trends[-1].last:  # one fall, seen by several windows
            previous = trends.pop()
            fall, p = max(previous.fall, fall), min(previous.p, p)
            trend = Decline(previous.first, trend.last, fall, p)
        trends.append(trend)
    return trends


def _tail_start(series: Series) -> float:
    """Step from which the learning rate is in its tail; infinite where it never gets there."""
    lr_T = np.nan_to_num(series.lr_T)
    if len(lr_T) == 0 or lr_T.max() == 0:
        return math.inf
    top = int(np.argmax(lr_T))
    tail_T = np.flatnonzero(lr_T[top:] < LR_TAIL * lr_T[top])
    return float(series.steps_T[top + tail_T[0]]) if len(tail_T) else math.inf


def mann_kendall(values: Array) -> float:
    """One-sided p of a falling trend (normal approximation with ties); 1.0 for too few values."""
    n = len(values)
    if n < _FEWEST_FOR_TREND:
        return 1.0
    signs = np.triu(np.sign(values[None, :] - values[:, None]), 1)
    score = float(signs.sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float(np.sum(ties * (ties - 1) * (2 * ties + 5)))) / 18
    if variance <= 0:
        return 1.0
    z = (score + 1) / math.sqrt(variance) if score < 0 else 0.0
    return 0.5 * math.erfc(-z / math.sqrt(2))
