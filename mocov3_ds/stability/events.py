"""When does a gradient or the loss stand out of its own past? Pure functions of arrays.

A series is compared with its own past: median and 1.4826 MAD of the previous W unflagged values, so
no detector knows a model's scale. Flagged values stay out of the past, up to a longest burst: after
that many the new level counts as the usual one.

Steps ascend and need not be consecutive; NaN means not measured and never fires.

Shape suffix: T = steps logged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.stability.findings import Array, Flags, LossEvent, Series, Steps
from mocov3_ds.stability.trailing import (
    TrailingWindow,
    is_measured,
    log_of,
    longest_run,
    row_spacing,
    trailing_ratio,
)

WINDOW = 200
"""values of the past that a gradient is compared with (1 % of the run where that is more)"""
LOSS_WINDOW = 30
"""values of the past that a loss is compared with: it falls, so its past must be near"""
HISTORY = 30
"""measured values of the past below which nothing fires"""
LONGEST_BURST = 100
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
"""least spread of log |g|: keeps a noiseless past from making each ripple an event"""
SPIKE_WINDOW, SPIKE_HISTORY = 1000, 100
"""values of the rolling mean of the spike scores, and how many there must be"""
SPIKE_Z, PAPER_Z = 7.0, 3.2
"""deviations above that mean: 7 (OLMo 2), 3.2 (arXiv 2304.13013)"""
SCORED_FROM = 100
"""steps of the first fall of the loss, in which no plain jump is counted"""


@dataclass(frozen=True)
class Excursion:
    """Steps that stand out, and how far.

    Attributes:
        first: first flagged step.
        last: last flagged step.
        peak: step that stands out most.
        size: how far it does: over the trailing median for a gradient; that minus 1 for a loss.
    """

    first: int
    last: int
    peak: int
    size: float


def merge_distance(steps_T: Steps) -> int:
    """Steps between flagged rows of one event: `MERGE`, or one quiet row where rows are rare."""
    return max(MERGE, 2 * row_spacing(steps_T))


def gradient_bursts(steps_T: Steps, grad_T: Array, window: int = WINDOW) -> list[Excursion]:
    """Events of one group's gradient; `size` is the largest gradient over the trailing median."""
    rows = is_measured(grad_T)  # rows in a row are measured ones
    steps_T, log_T = steps_T[rows], log_of(grad_T[rows])
    flags_T, sizes_T = np.zeros(len(log_T), bool), np.zeros(len(log_T))
    history, flagged_in_a_row = TrailingWindow(window), 0
    for row, value in enumerate(log_T):
        if value == -math.inf:
            continue
        if len(history) >= HISTORY:
            excess = value - history.median()
            if excess > math.log(BURST_RATIO):
                flags_T[row] = excess > BURST_Z * max(history.spread(), SMALLEST_SPREAD)
                sizes_T[row] = math.exp(min(excess, 700.0))
        flagged_in_a_row = flagged_in_a_row + 1 if flags_T[row] else 0
        if (not flags_T[row] or flagged_in_a_row > LONGEST_BURST) and value < math.inf:
            history.append(float(value))
    return _group_flags(steps_T, flags_T, sizes_T, rows_in_a_row=BURST_ROWS)


def loss_jumps(steps_T: Steps, loss_T: Array, deviations: float = LOSS_Z) -> list[Excursion]:
    """Events of the loss; `size` is the largest excess over the trailing median, as a share.

    A run's first excesses are over shorter pasts, down to a single value. They tell its noise until
    there are `HISTORY` others; while the loss falls fast they spread more, and hide small jumps.

    Args:
        steps_T: logged steps, (T,), ascending.
        loss_T: loss of each step, (T,); not finite where it was not.
        deviations: robust standard deviations of the past's excess that a jump must have; 0 for
            a run without gradient noise, where each rise counts.
    """
    flags_T, sizes_T = np.zeros(len(loss_T), bool), np.zeros(len(loss_T))
    history, flagged_in_a_row = TrailingWindow(LOSS_WINDOW), 0
    early_excesses, excesses = TrailingWindow(WINDOW), TrailingWindow(WINDOW)
    for row, value in enumerate(loss_T):
        if not value < math.inf:
            continue
        excess = math.nan
        old_enough = len(history) >= HISTORY
        if len(history) and history.median() > 0:
            excess = value / history.median() - 1
            if old_enough and excess > LOSS_EXCESS:
                noise = excesses if len(excesses) >= HISTORY else early_excesses
                flags_T[row] = excess > deviations * (noise.spread() if len(noise) else 0.0)
                sizes_T[row] = excess
        flagged_in_a_row = flagged_in_a_row + 1 if flags_T[row] else 0
        if not flags_T[row] or flagged_in_a_row > LONGEST_BURST:
            history.append(float(value))
            if not math.isnan(excess):
                early_excesses.append(excess)
                if old_enough:
                    excesses.append(excess)
    return _group_flags(steps_T, flags_T, sizes_T, rows_in_a_row=1)


def _group_flags(
    steps_T: Steps, flags_T: Flags, sizes_T: Array, *, rows_in_a_row: int
) -> list[Excursion]:
    """Flagged steps as events, those without so many flagged rows in a row left out."""
    flagged, distance = np.flatnonzero(flags_T), merge_distance(steps_T)
    events = []
    for group in np.split(flagged, np.flatnonzero(np.diff(steps_T[flagged]) > distance) + 1):
        if len(group) and longest_run(flags_T[group[0] : group[-1] + 1]) >= rows_in_a_row:
            peak = group[np.argmax(sizes_T[group])]
            first, last = int(steps_T[group[0]]), int(steps_T[group[-1]])
            events.append(Excursion(first, last, int(steps_T[peak]), float(sizes_T[peak])))
    return events


def merge_excursions(events: Sequence[Excursion], distance: int = MERGE) -> list[Excursion]:
    """Events of all groups as events of the run: those at most `distance` steps apart are one."""
    merged: list[Excursion] = []
    for event in sorted(events, key=lambda event: event.first):
        if merged and event.first - merged[-1].last <= distance:
            top = max(merged[-1], event, key=lambda one: one.size)
            last = max(merged[-1].last, event.last)
            merged[-1] = Excursion(merged[-1].first, last, top.peak, top.size)
        else:
            merged.append(event)
    return merged


def count_spikes(values_T: Array, deviations: float) -> int:
    """Steps so many standard deviations above the rolling mean of the (up to) 1000 before them."""
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
    return int(np.sum(spikes_T & finite_T & (count_T >= SPIKE_HISTORY)))


def plain_jumps(series: Series) -> list[LossEvent]:
    """Every rise of the loss more than 1 % above the median of the 30 logged steps before.

    A plainer test than the verdict's, which also asks how far the loss wanders otherwise.
    """
    return [
        LossEvent(first=jump.first, last=jump.last, peak=jump.peak, excess=jump.size)
        for jump in loss_jumps(series.steps_T, series.loss_T, deviations=0.0)
        if jump.peak > SCORED_FROM
    ]


def loss_excess(series: Series) -> Array:
    """Loss above the median of the 30 logged steps before, percent, (T,); NaN until step 100."""
    excess_T = 100 * (trailing_ratio(series.loss_T, LOSS_WINDOW) - 1)
    excess_T[series.steps_T <= SCORED_FROM] = np.nan
    return excess_T
