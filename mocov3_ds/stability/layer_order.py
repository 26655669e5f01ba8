"""Which layer moves first: the first trained one or the last block, and by how many steps?

Measured in each gradient event alone: between events both series are the noise of the same batches,
which moves all layers in the same step.

Shape suffix: T = steps logged.
"""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from scipy import special

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.events import HISTORY, SMALLEST_SPREAD, WINDOW, Excursion
from mocov3_ds.stability.findings import Array, Lead, Series, Steps
from mocov3_ds.stability.paired import ALPHA
from mocov3_ds.stability.trailing import MAD_TO_DEVIATION, is_measured, log_of

LEAD_Z = 4.0
"""a layer has moved at its first two steps in a row this far out (and half again the median)"""
LEAD_REACH = 100
"""steps around a peak in which a layer's first move is looked for, at most half the way to the
neighbouring event"""
_FEWEST = 6
"""events below which the median has no 95 % interval"""


def measure_lead(
    series: Series, bursts: Mapping[str, Sequence[Excursion]], window: int
) -> Lead | None:
    """Lead of the first trained layer over the last block, of any backbone (`outer_layers`).

    None where fewer than two such groups are trained. `bursts` are the gradient events of each
    group, `window` is the number of values of the past that a move is compared with.
    """
    layers = outer_layers(series)
    if layers is None:
        return None
    shallow, deep = layers
    shallow_T, deep_T = series.gradient_of(shallow), series.gradient_of(deep)
    rows = is_measured(shallow_T, deep_T)
    steps_T, shallow_T, deep_T = series.steps_T[rows], shallow_T[rows], deep_T[rows]
    per_event = event_leads(steps_T, shallow_T, deep_T, bursts[shallow], window)
    return summarise_leads(shallow, deep, per_event)


def outer_layers(series: Series) -> tuple[str, str] | None:
    """The trained layer nearest to the input and the last trained block; None without two of them.

    Blocks are the groups that are numbered: `block_3`, `layer4.1`, `stages.3.blocks.0`. What stands
    between (tokens, tables of positions) and behind them (a norm, the heads) is no such layer.
    """
    trained = series.trained_groups()
    layers = [
        group
        for group in trained
        if group == series.groups[0] or any(part.isdigit() for part in re.split("[._]", group))
    ]
    return (layers[0], layers[-1]) if len(layers) >= 2 else None


def event_leads(
    steps_T: Steps,
    shallow_T: Array,
    deep_T: Array,
    events: Sequence[Excursion],
    window: int = WINDOW,
) -> list[int]:
    """Steps from the shallow layer's first move to the deep one's, of each event that both show.

    Args:
        steps_T: logged steps, (T,), ascending.
        shallow_T: gradient of the shallow layer, (T,).
        deep_T: gradient of the deep layer, (T,).
        events: events of the shallow layer, ascending. A search goes at most half the way to the
            neighbouring event, so a lag longer than that cannot be seen.
        window: values of the past that a move is compared with.
    """
    leads = []
    peaks = [event.peak for event in events]
    measured = [(x_T, is_measured(x_T)) for x_T in (shallow_T, deep_T)]
    layers = [(steps_T[rows], log_of(x_T[rows])) for x_T, rows in measured]
    for index, peak in enumerate(peaks):
        low, high = peak - LEAD_REACH, peak + LEAD_REACH
        if index > 0:
            low = max(low, (peaks[index - 1] + peak) // 2)
        if index + 1 < len(peaks):
            high = min(high, (peak + peaks[index + 1]) // 2)
        moves = [_first_move(*layer, low, high, window) for layer in layers]
        if moves[0] is not None and moves[1] is not None:
            leads.append(moves[1] - moves[0])
    return leads


def _first_move(steps_T: Steps, log_T: Array, low: int, high: int, window: int) -> int | None:
    """First of two rows in a row of [low, high] that stand out of what came before `low`.

    `steps_T` and `log_T` are the measured rows of a layer, and the logarithm of its gradient.
    """
    start, end = np.searchsorted(steps_T, [low, high + 1])
    history = log_T[max(start - window, 0) : start]
    history = history[np.isfinite(history)]
    if len(history) < HISTORY:
        return None
    middle = float(np.median(history))
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(history - middle)))
    threshold = max(LEAD_Z * max(deviation, SMALLEST_SPREAD), math.log(1.5))
    moved = (log_T[start:end] - middle) > threshold
    twice = np.flatnonzero(moved[:-1] & moved[1:])
    return int(steps_T[start + twice[0]]) if len(twice) else None


def median_interval(values: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % interval between two of the values; NaN where there are too few.

    That the median lies outside has the probability of a fair coin (the sign test), whatever the
    values' distribution, so fewer than 6 values give no interval: 2 / 2^5 is above 5 %.
    """
    if not values:
        return math.nan, (math.nan, math.nan)
    count, ordered = len(values), sorted(values)
    # the largest number of values that may be cut off at each end
    cut = -1
    while 2 * special.bdtr(cut + 1, count, 0.5) <= ALPHA:
        cut += 1
    if cut < 0:
        return float(median(values)), (math.nan, math.nan)
    return float(median(values)), (float(ordered[cut]), float(ordered[count - 1 - cut]))


def summarise_leads(first_group: str, last_group: str, per_event: Sequence[int]) -> Lead:
    """Leads of events, of one run or of all runs of an arm, with median, interval and order."""
    middle, interval = median_interval(per_event)
    return Lead(
        first_group=first_group,
        last_group=last_group,
        per_event=tuple(per_event),
        median=middle,
        interval=interval,
        shallow_first=middle > 0 and interval[0] > 0,
    )


def pool_leads(leads: Sequence[Lead | None]) -> Lead | None:
    """The events of all runs as one lead; None where no run compares the layers of the first."""
    known_leads = [lead for lead in leads if lead is not None]
    if not known_leads:
        return None
    first, last = known_leads[0].first_group, known_leads[0].last_group
    same_pair = [
        lead for lead in known_leads if (lead.first_group, lead.last_group) == (first, last)
    ]
    return summarise_leads(first, last, [lag for lead in same_pair for lag in lead.per_event])


def describe_lead(lead: Lead | None) -> str:
    """Which layer moves first, by how many steps, in how many events: a clause for a page."""
    if lead is None:
        return "fewer than two layers with gradients"
    count = len(lead.per_event)
    if not count:
        return f"no gradient event that {lead.first_group} and {lead.last_group} both show"
    ahead = lead.first_group if lead.median > 0 else lead.last_group
    clause = f"{ahead} leads by {abs(lead.median):g} steps"
    if lead.median == 0:
        clause = f"{lead.first_group} and {lead.last_group} move in the same step"
    low, high = lead.interval
    if math.isnan(low):
        return f"{clause} (median of {count_noun(count, 'event')}; an interval needs {_FEWEST})"
    order = "" if low > 0 or high < 0 else ": the order cannot be told"
    return f"{clause} (95 % interval {low:g} to {high:g}, {count_noun(count, 'event')}{order})"
