"""Detectors on logged series: bursts, loss jumps, dips, trends, leads. Pure functions of arrays.

A series is compared with its own past: median and 1.4826 MAD of the previous W unflagged values, so
no detector knows a model's scale. Flagged values stay out of the past, up to a longest burst: after
that many the new level counts as the usual one.

Steps ascend and need not be consecutive; NaN means not measured and never fires.

Shape suffixes: T = steps logged, K = k-NN evaluations, L = lags, N = blocks or resamples.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Steps = npt.NDArray[np.int64]

WINDOW = 200
"""values of the past that a gradient is compared with (1 % of the run where that is more)"""
LOSS_WINDOW = 30
"""values of the past that a loss is compared with: it falls, so its past must be near"""
HISTORY = 30
"""measured values of the past below which nothing fires"""
LONGEST = 100
"""flagged values in a row after which the new level enters the past"""
BURST_Z = 6.0
"""a gradient burst is this many robust standard deviations of log |g| above the median"""
BURST_RATIO = 3.0
"""and this many times the median"""
BURST_ROWS = 2
"""for so many logged steps in a row"""
MERGE = 20
"""bursts no more than this many steps (or two measured ones) apart are one event"""
LOSS_EXCESS = 0.01
"""a loss jump is this share above the trailing median"""
LOSS_Z = 6.0
"""and this many robust standard deviations of the past's excess"""
SMALLEST_SPREAD = 0.01
"""of log |g|: keeps a noiseless past from making each ripple an event"""
LEAD_Z = 4.0
"""a layer has moved at its first two steps in a row this far out (and half again the median)"""
LEAD_REACH = 100
"""steps around a peak in which a layer's first move is looked for, at most half the way to the
neighbouring event"""
SPIKE_WINDOW, SPIKE_Z, PAPER_Z = 1000, 7.0, 3.2
"""rolling mean of the spike scores: 7 deviations (OLMo 2), 3.2 (arXiv 2304.13013)"""
RESAMPLES = 1000
"""of each bootstrap"""


@dataclass(frozen=True)
class Burst:
    """A run of flagged steps: first, last and largest, and by how much the largest stands out."""

    first: int
    last: int
    peak: int
    size: float


class _Past:
    """The last `window` values in order and sorted."""

    def __init__(self, window: int) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        if len(self._order) == self._window:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    def median(self) -> float:
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    def spread(self) -> float:
        values = np.array(self._sorted)
        return float(1.4826 * np.median(np.abs(values - self.median())))


def measured(*values_T: Array) -> Flags:
    """Rows in which one of the series was measured, (T,)."""
    flags: Flags = ~np.all(np.isnan(values_T), axis=0)
    return flags


def spacing(steps_T: Steps) -> int:
    """Steps from one row to the next, most of the time."""
    return round(float(np.median(np.diff(steps_T)))) if len(steps_T) > 1 else 1


def merge_within(steps_T: Steps) -> int:
    """Steps between flagged rows of one event: `MERGE`, or one quiet row where rows are rare."""
    return max(MERGE, 2 * spacing(steps_T))


def window_of(total_steps: int) -> int:
    """W of a run: 200 values, or 1 % of the run."""
    return max(WINDOW, total_steps // 100)


def gradient_bursts(steps_T: Steps, grad_T: Array, window: int = WINDOW) -> list[Burst]:
    """Events of one group's gradient; `size` is the largest over the trailing median."""
    rows = measured(grad_T)  # rows in a row are measured ones
    steps_T, grad_T = steps_T[rows], grad_T[rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_T = np.log(grad_T)
    flags_T, sizes_T = np.zeros(len(log_T), bool), np.zeros(len(log_T))
    past, in_a_row = _Past(window), 0
    for row, value in enumerate(log_T):
        if value == -math.inf:
            continue
        if len(past) >= HISTORY:
            above = value - past.median()
            if above > math.log(BURST_RATIO):
                flags_T[row] = above > BURST_Z * max(past.spread(), SMALLEST_SPREAD)
                sizes_T[row] = math.exp(min(above, 700.0))
        in_a_row = in_a_row + 1 if flags_T[row] else 0
        if (not flags_T[row] or in_a_row > LONGEST) and value < math.inf:
            past.add(float(value))
    return _merged(steps_T, flags_T, sizes_T, rows=BURST_ROWS)


def loss_jumps(steps_T: Steps, loss_T: Array, deviations: float = LOSS_Z) -> list[Burst]:
    """Events of the loss; `size` is the largest excess over the trailing median, as a share.

    Where a run has no gradient noise, each rise is one: `deviations` may be 0 then.

    A run's first excesses are over shorter pasts, down to a single value. They tell its noise until
    there are `HISTORY` others; while the loss falls fast they spread more, and hide small jumps.
    """
    flags_T, sizes_T = np.zeros(len(loss_T), bool), np.zeros(len(loss_T))
    past, first, excesses, in_a_row = _Past(LOSS_WINDOW), _Past(WINDOW), _Past(WINDOW), 0
    for row, value in enumerate(loss_T):
        if not value < math.inf:
            continue
        excess = math.nan
        old_enough = len(past) >= HISTORY
        if len(past) and past.median() > 0:
            excess = value / past.median() - 1
            if old_enough and excess > LOSS_EXCESS:
                known = excesses if len(excesses) >= HISTORY else first
                flags_T[row] = excess > deviations * (known.spread() if len(known) else 0.0)
                sizes_T[row] = excess
        in_a_row = in_a_row + 1 if flags_T[row] else 0
        if not flags_T[row] or in_a_row > LONGEST:
            past.add(float(value))
            if not math.isnan(excess):
                first.add(excess)
                if old_enough:
                    excesses.add(excess)
    return _merged(steps_T, flags_T, sizes_T, rows=1)


def _merged(steps_T: Steps, flags_T: Flags, sizes_T: Array, rows: int) -> list[Burst]:
    """Flagged steps as events, those without `rows` flagged rows in a row left out."""
    where, apart = np.flatnonzero(flags_T), merge_within(steps_T)
    events = []
    for part in np.split(where, np.flatnonzero(np.diff(steps_T[where]) > apart) + 1):
        if len(part) and _longest_run(part) >= rows:
            top = part[np.argmax(sizes_T[part])]
            first, last = int(steps_T[part[0]]), int(steps_T[part[-1]])
            events.append(Burst(first, last, int(steps_T[top]), float(sizes_T[top])))
    return events


def _longest_run(rows: npt.NDArray[np.int64]) -> int:
    breaks = np.flatnonzero(np.diff(rows) > 1)
    return int(np.max(np.diff([-1, *breaks, len(rows) - 1])))


def union(events: Sequence[Burst], apart: int = MERGE) -> list[Burst]:
    """Events of several groups as events of the run: those that overlap or nearly so are one."""
    joined: list[Burst] = []
    for event in sorted(events, key=lambda event: event.first):
        if joined and event.first - joined[-1].last <= apart:
            top = max(joined[-1], event, key=lambda one: one.size)
            last = max(joined[-1].last, event.last)
            joined[-1] = Burst(joined[-1].first, last, top.peak, top.size)
        else:
            joined.append(event)
    return joined


def steps_above(values_T: Array, deviations: float) -> int:
    """Steps so many standard deviations above the rolling mean of the (up to) 1000 before them."""
    finite_T = np.isfinite(values_T)
    x_T = np.where(finite_T, values_T, 0.0)
    # around the first value: the sums of squares would otherwise cancel
    x_T = np.where(finite_T, x_T - (x_T[finite_T][:1].sum() if finite_T.any() else 0.0), 0.0)
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (finite_T, x_T, x_T * x_T)]
    here = np.arange(len(values_T))
    start = np.maximum(here - SPIKE_WINDOW, 0)
    count, total, square = (part[here] - part[start] for part in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / count
        spread = np.sqrt(np.maximum(square / count - mean * mean, 0.0))
        above = (x_T - mean >= deviations * spread) & (spread > 0)
    return int(np.sum(above & finite_T & (count >= 100)))


# the k-NN curve


@dataclass(frozen=True)
class Drawdown:
    """Evaluations (indices) at which a dip opens, is deepest, ends; and whether accuracy came back.

    `sudden` tells a fall within a few evaluations from a slow slide.
    """

    first: int
    lowest: int
    last: int
    closed: bool
    sudden: bool


SMALLEST_DIP = 1.0
"""points"""
DIP_SIGMAS = 4.0
"""and binomial errors of the probes"""
SUDDEN = 0.03
"""a fall within this share of the run (or three evaluations) is sudden"""


def smoothed(knn_K: Array) -> Array:
    """Median of three (two at the ends), (K,): one odd evaluation is no dip."""
    return np.array([np.median(knn_K[max(i - 1, 0) : i + 2]) for i in range(len(knn_K))])


def binomial_error(accuracy: Array | float, probes: int) -> Array:
    """Standard error in points of an accuracy in percent on so many images; 0 if unknown."""
    p = np.clip(np.asarray(accuracy, float) / 100, 0.0, 1.0)
    return 100 * np.sqrt(p * (1 - p) / probes) if probes else np.zeros_like(p)


def dip_threshold(best: Array | float, probes: int) -> Array:
    """Points below `best` from which on a drawdown is a dip."""
    return np.maximum(SMALLEST_DIP, DIP_SIGMAS * binomial_error(best, probes))


def drawdowns(steps_K: Steps, knn_K: Array, probes: int, total_steps: int) -> list[Drawdown]:
    """Dips of a k-NN curve: open above the threshold, closed below half of it."""
    a_K = smoothed(knn_K)
    best_K = np.maximum.accumulate(a_K) if len(a_K) else a_K
    down_K, limit_K = best_K - a_K, dip_threshold(best_K, probes)
    found, at = [], 0
    while at < len(a_K):
        if down_K[at] <= limit_K[at]:
            at += 1
            continue
        first, last = at, at
        while last + 1 < len(a_K) and down_K[last] >= limit_K[last] / 2:
            last += 1
        closed = bool(down_K[last] < limit_K[last] / 2)
        lowest = first + int(np.argmax(down_K[first : last + 1]))
        before = int(np.flatnonzero(down_K[: first + 1] < limit_K[first] / 2)[-1])
        fallen = first + int(np.argmax(down_K[first:] >= 0.8 * down_K[lowest]))
        few = 3 * float(np.median(np.diff(steps_K))) if len(steps_K) > 1 else 0.0
        sudden = steps_K[fallen] - steps_K[before] <= max(few, SUDDEN * total_steps)
        found.append(Drawdown(first, lowest, last, closed, bool(sudden)))
        at = last + 1
    return found


def mann_kendall(values: Array) -> float:
    """One-sided p of a falling trend (normal approximation with ties); 1.0 for too few values."""
    n = len(values)
    if n < 8:
        return 1.0
    above = np.triu(np.sign(values[None, :] - values[:, None]), 1)
    score = float(above.sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float(np.sum(ties * (ties - 1) * (2 * ties + 5)))) / 18
    if variance <= 0:
        return 1.0
    z = (score + 1) / math.sqrt(variance) if score < 0 else 0.0
    return 0.5 * math.erfc(-z / math.sqrt(2))


# which layer first


def leads(
    steps_T: Steps, shallow_T: Array, deep_T: Array, events: Sequence[Burst], window: int = WINDOW
) -> list[int]:
    """Steps from the shallow layer's first move to the deep one's, of each event that both show.

    Args:
        steps_T: logged steps.
        shallow_T: gradient of the shallow layer.
        deep_T: gradient of the deep layer.
        events: of the shallow layer, ascending. A search goes at most half the way to the
            neighbouring event, so a lag longer than that cannot be told.
        window: values of the past.
    """
    found = []
    peaks = [event.peak for event in events]
    for index, peak in enumerate(peaks):
        low, high = peak - LEAD_REACH, peak + LEAD_REACH
        if index > 0:
            low = max(low, (peaks[index - 1] + peak) // 2)
        if index + 1 < len(peaks):
            high = min(high, (peak + peaks[index + 1]) // 2)
        moves = [_first_move(steps_T, x_T, low, high, window) for x_T in (shallow_T, deep_T)]
        if moves[0] is not None and moves[1] is not None:
            found.append(moves[1] - moves[0])
    return found


def _first_move(steps_T: Steps, grad_T: Array, low: int, high: int, window: int) -> int | None:
    """First of two rows in a row of [low, high] that stand out of what came before `low`."""
    rows = measured(grad_T)
    steps_T, grad_T = steps_T[rows], grad_T[rows]
    start, end = np.searchsorted(steps_T, [low, high + 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_T = np.log(grad_T)
    past = log_T[max(start - window, 0) : start]
    past = past[np.isfinite(past)]
    if len(past) < HISTORY:
        return None
    middle = float(np.median(past))
    spread = max(1.4826 * float(np.median(np.abs(past - middle))), SMALLEST_SPREAD)
    out = (log_T[start:end] - middle) > max(LEAD_Z * spread, math.log(1.5))
    twice = np.flatnonzero(out[:-1] & out[1:])
    return int(steps_T[start + twice[0]]) if len(twice) else None


def cross_lag(
    shallow_T: Array, deep_T: Array, reach: int, seed: int = 0
) -> tuple[int, tuple[float, float], float]:
    """Lag (rows, positive: deep later) of the largest cross-correlation of two residual series.

    The residual is log |g| minus its running median over 201 rows.

    Args:
        shallow_T: gradient of the shallow layer.
        deep_T: gradient of the deep layer.
        reach: largest lag looked at, either way.
        seed: of the block bootstrap.

    Returns:
        the lag, its 95 % interval by resampling blocks of four times the reach, the correlation.
    """
    a_T, b_T = _residual(shallow_T), _residual(deep_T)
    lags = np.arange(-reach, reach + 1)
    size = float(np.sqrt(np.sum(a_T * a_T) * np.sum(b_T * b_T)))
    if size == 0 or len(a_T) <= 2 * reach:
        return 0, (math.nan, math.nan), 0.0
    block = max(4 * reach, 50)
    starts = range(0, len(a_T), block)
    sums_NL: Array = np.array(
        [[_product(a_T, b_T, s, s + block, int(lag)) for lag in lags] for s in starts]
    )
    best = int(np.argmax(sums_NL.sum(axis=0)))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(starts), [1 / len(starts)] * len(starts), RESAMPLES)
    drawn = lags[np.argmax(counts @ sums_NL, axis=1)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    correlation = float(sums_NL.sum(axis=0)[best]) / size
    return int(lags[best]), (float(low), float(high)), correlation


def _residual(grad_T: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_T = np.log(grad_T)
    known = np.flatnonzero(np.isfinite(log_T))
    if len(known) == 0:
        return np.zeros(len(log_T))
    filled_T = np.interp(np.arange(len(log_T)), known, log_T[known])
    half = min(100, (len(filled_T) - 1) // 2)
    padded = np.pad(filled_T, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    residual: Array = filled_T - np.median(windows, axis=1)
    return residual


def _product(a_T: Array, b_T: Array, start: int, end: int, lag: int) -> float:
    """Sum of a[t] * b[t + lag] for t in [start, end) where both exist."""
    start, end = max(start, -lag, 0), min(end, len(a_T), len(a_T) - lag)
    return float(np.dot(a_T[start:end], b_T[start + lag : end + lag])) if start < end else 0.0


def median_interval(values: Sequence[int], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % bootstrap interval; NaN without values."""
    if not values:
        return math.nan, (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(median(values)), (float(low), float(high))


# how good an alarm is

HORIZON = 8
"""steps before a loss event in which an alarm foretells it"""


@dataclass(frozen=True)
class Foretold:
    """How well an early alarm foretells loss events within the next 8 steps.

    Attributes:
        alarms: episodes of it.
        right: episodes that a loss event followed.
        caught: loss events that it foretold.
        events: loss events in all.
        base_rate: share of all steps that a loss event follows: precision of a random alarm.
        leads: steps from the alarm to the onset of each caught event.
    """

    alarms: int
    right: int
    caught: int
    events: int
    base_rate: float
    leads: tuple[int, ...]

    @property
    def precision(self) -> float:
        """Share of the alarms that were right; NaN without alarms."""
        return self.right / self.alarms if self.alarms else float("nan")

    @property
    def recall(self) -> float:
        """Share of the loss events that were foretold; NaN without events."""
        return self.caught / self.events if self.events else float("nan")


def foretold(steps_T: Steps, alarm_T: Flags, onsets: Sequence[int]) -> Foretold:
    """Match an alarm with the loss events that begin 1 to 8 steps after it.

    Args:
        steps_T: logged steps in which the rule's signals were measured.
        alarm_T: whether the rule was broken.
        onsets: first step of each loss event, ascending.
    """
    raised = steps_T[alarm_T]
    episodes = list(_episodes(raised, merge_within(steps_T)))
    caught, leads_ = 0, []
    for onset in onsets:
        before = [e for e in episodes if np.any((onset - HORIZON <= e) & (e < onset))]
        if before:
            caught += 1
            leads_.append(int(onset - before[-1][0]))
    soon = np.zeros(len(steps_T), bool)
    for onset in onsets:
        soon |= (steps_T >= onset - HORIZON) & (steps_T < onset)
    right = sum(bool(np.any(np.isin(e, steps_T[soon]))) for e in episodes)
    rate = float(np.mean(soon)) if len(soon) else math.nan
    return Foretold(len(episodes), right, caught, len(onsets), rate, tuple(leads_))


def _episodes(raised: Steps, apart: int) -> Iterator[Steps]:
    """Steps of an alarm, split where it was silent for more steps than `apart`."""
    for part in np.split(raised, np.flatnonzero(np.diff(raised) > apart) + 1):
        if len(part):
            yield part
