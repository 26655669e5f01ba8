"""When does a gradient or the loss stand out of its own past? Pure functions of arrays.

A series is compared with its own past, so no detector knows a model's scale; how far a value must
stand out, and for how many rows, follows from the tails of its noise (`outliers`). Flagged values
stay out of the past, up to a longest burst: after that many the new level counts as the usual one.
Of a loss it is what a smooth trend of the whole run leaves that is compared (`loss_trend`).

Steps ascend and need not be consecutive; NaN means not measured and never fires.

Shape suffixes: T = steps logged, G = layer groups.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mocov3_ds.monitoring.medians import median_of, medians_of_windows
from mocov3_ds.stability.findings import Array, Flags, LossEvent, Series, Steps
from mocov3_ds.stability.loss_trend import smooth_trend
from mocov3_ds.stability.outliers import HEAVY, LONGEST_RUN, Past, common_tails, stand_out
from mocov3_ds.stability.trailing import (
    is_measured,
    log_of,
    row_spacing,
    trailing_ratio,
)

WINDOW = 200
"""values of the past that a gradient is compared with (1 % of the run where that is more)"""
LOSS_WINDOW = 30
"""values of the past that a loss is compared with: no more, as some of its fall is left"""
LOSS_SPREAD_WINDOW = 100
"""values of the past that tell the noise of a loss: it shrinks as the loss falls"""
HISTORY = 16
"""measured values of the past below which nothing fires"""
BURST_RATIO = 3.0
"""a gradient burst of several rows is this many times the median"""
SINGLE_RATIO = 4.0
"""a burst of one row is this many times the median"""
SHORT = 3000
"""measured values below which a group's tails are no lighter than those of all groups together"""
MERGE = 20
"""bursts no more than this many steps (or two measured ones) apart are one event"""
LOSS_EXCESS = 0.01
"""a loss jump is this share above its level; of the range, where losses are not above 0"""
SMALLEST_LEVEL = 0.1
"""share of the range of losses that are not all above 0 as which a level nearer to 0 counts"""
TOGETHER_RATIO = 2.0
"""a burst of all groups together is so many times the median, in the median over them"""
SMALLEST_SPREAD = 0.01
"""least spread of log |g|: keeps a noiseless past from making each ripple an event"""
SPIKE_WINDOW, SPIKE_HISTORY = 1000, 100
"""values of the rolling mean of the spike scores, and how many there must be"""
SPIKE_Z, PAPER_Z = 7.0, 3.2
"""deviations above that mean: 7 (OLMo 2), 3.2 (arXiv 2304.13013)"""
SCORED_FROM = 100
"""steps of the first fall of the loss, in which no plain jump is counted"""
ROWS_PER_DEGREE = 75
"""the noise of a loss counts as having tails of no more degrees than that many times in its rows:
few rows do not tell light tails from heavy ones"""
JUST_BEFORE, SUDDEN = 5, 0.5
"""a loss jump is above the median of so many rows before it, by so much of its excess at least"""
LONG_BEFORE = 5
"""and above that of a part of the run before it, one of so many, as far as its trend goes"""
_ALONE, _TOGETHER = (SINGLE_RATIO, BURST_RATIO), (TOGETHER_RATIO, TOGETHER_RATIO)


@dataclass(frozen=True)
class Excursion:
    """Steps that stand out, and how far.

    Attributes:
        first: first flagged step.
        last: last flagged step.
        peak: step that stands out most.
        size: how far it does: over the trailing median for a gradient; for a loss the excess as a
            share of its level.
        rows: number of flagged rows.
    """

    first: int
    last: int
    peak: int
    size: float
    rows: int = 0


def merge_distance(steps_T: Steps) -> int:
    """Steps between flagged rows of one event: `MERGE`, or one quiet row where rows are rare."""
    return max(MERGE, 2 * row_spacing(steps_T))


def gradient_bursts(steps_T: Steps, grad_GT: Array, window: int = WINDOW) -> list[list[Excursion]]:
    """Events of each group's gradient; `size` is the largest gradient over the trailing median.

    What stands out in the median over the groups alone, a spike of a single step in all layers for
    example, is an event of each group that is `TOGETHER_RATIO` times its own median there; near an
    event of one group, `BURST_RATIO` times, so that each group's events begin when it moves.

    Args:
        steps_T: logged steps, (T,), ascending.
        grad_GT: largest gradient of each group, (G, T); NaN where not measured.
        window: values of the past.
    """
    trained = [row for row, grad_T in enumerate(grad_GT) if np.isfinite(grad_T).any()]
    past = Past(window, window, HISTORY, SMALLEST_SPREAD)
    log_GT = log_of(grad_GT)
    finite_GT = np.isfinite(log_GT)
    tails = math.inf
    if max(np.sum(finite_GT[trained], axis=1), default=0) < SHORT:
        tails = common_tails([log_GT[row, finite_GT[row]] for row in trained], past)
    look = partial(_flag_gradient, past=past, series=len(trained) + 1)
    flags_GT, excess_GT = np.zeros(grad_GT.shape, bool), np.full(grad_GT.shape, np.nan)
    for row in trained:
        rows = np.flatnonzero(is_measured(grad_GT[row]))  # rows in a row are measured ones
        flags_GT[row, rows], excess_GT[row, rows] = look(log_GT[row, rows], degrees=tails)
    distance = merge_distance(steps_T[is_measured(*grad_GT)] if len(grad_GT) else steps_T)
    if len(trained) > 2:
        excess_TG = excess_GT[trained].T
        rows = np.flatnonzero(np.isfinite(excess_TG).all(axis=1))
        together_T, _ = look(medians_of_windows(excess_TG[rows]), ratios=_TOGETHER)
        rows = rows[together_T]
        alone = steps_T[flags_GT.any(axis=0)]
        ratio_T = np.where(_is_near(steps_T[rows], alone, distance), BURST_RATIO, TOGETHER_RATIO)
        with np.errstate(invalid="ignore"):
            flags_GT[:, rows] |= excess_GT[:, rows] > np.log(ratio_T)
    bursts = []
    for flags_T, excess_T in zip(flags_GT, excess_GT, strict=True):
        flagged = np.flatnonzero(flags_T)
        sizes = np.exp(np.minimum(np.nan_to_num(excess_T[flagged], nan=0.0, posinf=700.0), 700.0))
        bursts.append(_group_flags(steps_T, flagged, sizes, distance))
    return bursts


def _is_near(steps_T: Steps, others: Steps, distance: int) -> Flags:
    """Which steps are at most so far from one of some others, which ascend, (T,)."""
    begin_T = np.searchsorted(others, steps_T - distance, "left")
    return begin_T < np.searchsorted(others, steps_T + distance, "right")


def _flag_gradient(
    log_T: Array,
    *,
    past: Past,
    series: int,
    degrees: float = math.inf,
    ratios: tuple[float, float] = _ALONE,
) -> tuple[Flags, Array]:
    """Rows in which a log gradient stands out, (T,), and how far each is above its level, (T,).

    `ratios` are how many times as large as its level one row must be, and each of several.
    """
    finite_T = np.isfinite(log_T)
    flags_T, excess_T = log_T == math.inf, np.full(len(log_T), np.nan)
    smallest = np.log([ratios[0]] + [ratios[1]] * (LONGEST_RUN - 1))
    flags_T[finite_T], excess_T[finite_T] = stand_out(
        log_T[finite_T], past, smallest, series=series, degrees=degrees
    )
    excess_T[log_T == math.inf] = math.inf
    return flags_T, excess_T


def loss_jumps(steps_T: Steps, loss_T: Array) -> list[Excursion]:
    """Events of the loss; `size` is the largest excess over its level, as a share of that.

    Args:
        steps_T: logged steps, (T,), ascending.
        loss_T: loss of each step, (T,); not finite where it was not.
    """
    rows, flags_T, size_T = flag_losses(loss_T)
    flagged = np.flatnonzero(flags_T)
    return _group_flags(steps_T[rows], flagged, size_T[flagged], merge_distance(steps_T))


def flag_losses(loss_T: Array) -> tuple[Steps, Flags, Array]:
    """Rows with a finite loss, whether each stands out, and by which share of its level.

    What is looked at is the logarithm of the loss, or, where losses at or below 0 are among them,
    the loss itself over its range; of either, what a smooth curve through all of it leaves.
    """
    rows = np.flatnonzero(np.isfinite(loss_T))
    finite_T = loss_T[rows]
    unit = _range_around_zero(finite_T)
    values_T = finite_T / unit if unit else np.log(finite_T)
    left_T = values_T - smooth_trend(values_T)
    flags_T, excess_T = stand_out(
        left_T,
        Past(LOSS_WINDOW, LOSS_SPREAD_WINDOW, HISTORY, LOSS_EXCESS / 10),
        np.full(LONGEST_RUN, math.log1p(LOSS_EXCESS)),
        degrees=max(HEAVY, len(rows) / ROWS_PER_DEGREE),
    )
    flags_T = _keep_sudden((values_T, JUST_BEFORE), flags_T, excess_T)
    flags_T = _keep_sudden((left_T, len(rows) // LONG_BEFORE), flags_T, excess_T)
    if unit:
        level_T = np.maximum(np.abs(values_T - excess_T), SMALLEST_LEVEL)
        return rows, flags_T, excess_T / level_T
    return rows, flags_T, np.expm1(np.minimum(excess_T, 700.0))


def _keep_sudden(before: tuple[Array, int], flags_T: Flags, excess_T: Array) -> Flags:
    """Flagged rows but for those that are hardly above what was before them, (T,).

    A smooth curve leads a sudden fall, and the rows before that are above the curve. Rows that come
    back to the curve, after some that were far below, are above these.

    Args:
        before: a series, (T,), and how many of its rows before an event tell what was.
        flags_T: what stands out, (T,).
        excess_T: by how much, (T,).
    """
    values_T, reach = before
    kept_T = flags_T.copy()
    flagged = np.flatnonzero(flags_T)
    for rows in np.split(flagged, np.flatnonzero(np.diff(flagged) > JUST_BEFORE) + 1):
        if len(rows):
            peak = rows[np.argmax(excess_T[rows])]
            usual = median_of(values_T[max(rows[0] - max(reach, JUST_BEFORE), 0) : rows[0]])
            kept_T[rows] = values_T[peak] - usual >= SUDDEN * excess_T[peak]
    return kept_T


def _range_around_zero(finite_T: Array) -> float:
    """Range of losses, but for a hundredth at either end, if some are at or below 0; else 0."""
    if len(finite_T) == 0 or np.min(finite_T) > 0:
        return 0.0
    low, high = np.quantile(finite_T, (0.01, 0.99))
    return float(high - low) or float(np.ptp(finite_T)) or 1.0


def _group_flags(steps_T: Steps, flagged: Steps, sizes: Array, distance: int) -> list[Excursion]:
    """Flagged rows, each with its size, as events: those at most `distance` steps apart are one."""
    steps = steps_T[flagged]
    cuts = np.flatnonzero(np.diff(steps) > distance) + 1
    events = []
    for first, end in itertools.pairwise([0, *cuts.tolist(), len(steps)]):
        if end > first:
            peak = first + int(np.argmax(sizes[first:end]))
            span = int(steps[first]), int(steps[end - 1]), int(steps[peak])
            events.append(Excursion(*span, float(sizes[peak]), end - first))
    return events


def merge_excursions(events: Sequence[Excursion], distance: int = MERGE) -> list[Excursion]:
    """Events of all groups as events of the run: those at most `distance` steps apart are one."""
    merged: list[Excursion] = []
    for event in sorted(events, key=lambda event: event.first):
        if merged and event.first - merged[-1].last <= distance:
            top = max(merged[-1], event, key=lambda one: one.size)
            last = max(merged[-1].last, event.last)
            rows = merged[-1].rows + event.rows
            merged[-1] = Excursion(merged[-1].first, last, top.peak, top.size, rows)
        else:
            merged.append(event)
    return merged


def flag_spikes(values_T: Array, deviations: float) -> Flags:
    """Steps so many standard deviations above the rolling mean of the (up to) 1000 before, (T,)."""
    finite_T = np.isfinite(values_T)
    x_T = np.where(finite_T, values_T, 0.0)
    # around the first value: the sums of squares would otherwise cancel
    x_T = np.where(finite_T, x_T - (x_T[finite_T][:1].sum() if finite_T.any() else 0.0), 0.0)
    end_T = np.arange(len(values_T))
    start_T = np.maximum(end_T - SPIKE_WINDOW, 0)
    sums = [np.concatenate([[0.0], np.cumsum(term_T)]) for term_T in (finite_T, x_T, x_T * x_T)]
    count_T, total_T, square_T = (sum_T[end_T] - sum_T[start_T] for sum_T in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_T = total_T / count_T
        spread_T = np.sqrt(np.maximum(square_T / count_T - mean_T * mean_T, 0.0))
        spikes_T = (x_T - mean_T >= deviations * spread_T) & (spread_T > 0)
    flags_T: Flags = spikes_T & finite_T & (count_T >= SPIKE_HISTORY)
    return flags_T


def loss_ratio(series: Series) -> Array:
    """Loss over the median of the 30 logged steps before, (T,); NaN for the first ones.

    Where losses are not all above 0: 1 and the excess over that median, as a share of its size.
    """
    least_level = SMALLEST_LEVEL * _range_around_zero(series.loss_T[np.isfinite(series.loss_T)])
    return trailing_ratio(series.loss_T, LOSS_WINDOW, least_level)


def plain_jumps(series: Series, ratio_T: Array | None = None) -> list[LossEvent]:
    """Every rise of the loss more than 1 % above the median of the 30 logged steps before.

    A plainer test than the verdict's, which also asks how far the loss wanders otherwise.

    Args:
        series: the run that is looked at.
        ratio_T: its `loss_ratio`, (T,), where that is known.
    """
    size_T = (loss_ratio(series) if ratio_T is None else ratio_T) - 1
    size_T[~np.isfinite(size_T) | (series.steps_T <= SCORED_FROM)] = 0.0
    flagged = np.flatnonzero(size_T > LOSS_EXCESS)
    distance = merge_distance(series.steps_T)
    jumps = _group_flags(series.steps_T, flagged, size_T[flagged], distance)
    return [
        LossEvent(first=jump.first, last=jump.last, peak=jump.peak, excess=jump.size)
        for jump in jumps
    ]


def loss_excess(series: Series, ratio_T: Array | None = None) -> Array:
    """Loss above the median of the 30 logged steps before, percent, (T,); NaN until step 100.

    `ratio_T` is the series' `loss_ratio`, (T,), where that is known.
    """
    excess_T = 100 * ((loss_ratio(series) if ratio_T is None else ratio_T) - 1)
    excess_T[series.steps_T <= SCORED_FROM] = np.nan
    return excess_T
