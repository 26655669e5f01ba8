"""Which layer moves first: the first trained one or the last block, and by how many steps?

Two measures that must agree: the lead in each gradient event, and the lag of the largest
cross-correlation of the two series.

Shape suffixes: T = steps logged, L = lags, N = blocks of the bootstrap.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from mocov3_ds.stability.events import HISTORY, SMALLEST_SPREAD, WINDOW, Excursion
from mocov3_ds.stability.findings import Array, Lead, Series, Steps
from mocov3_ds.stability.trailing import MAD_TO_DEVIATION, is_measured, log_of, row_spacing

LEAD_Z = 4.0
"""a layer has moved at its first two steps in a row this far out (and half again the median)"""
LEAD_REACH = 100
"""steps around a peak in which a layer's first move is looked for, at most half the way to the
neighbouring event"""
RESAMPLES = 1000
"""resamples of each bootstrap"""


def measure_lead(
    series: Series, bursts: Mapping[str, Sequence[Excursion]], window: int
) -> Lead | None:
    """Lead of the first trained layer (the class token is none) over the last block.

    None where fewer than two such groups are trained. `bursts` are the gradient events of each
    group, `window` is the number of values of the past that a move is compared with.
    """
    layers = [g for g in series.trained_groups() if g == "patch_embed" or g.startswith("block_")]
    if len(layers) < 2:
        return None
    shallow, deep = layers[0], layers[-1]
    shallow_T, deep_T = series.gradient_of(shallow), series.gradient_of(deep)
    rows = is_measured(shallow_T, deep_T)
    steps_T, shallow_T, deep_T = series.steps_T[rows], shallow_T[rows], deep_T[rows]
    per_event = event_leads(steps_T, shallow_T, deep_T, bursts[shallow], window)
    middle, interval = median_interval(per_event)
    distances = np.diff([burst.peak for burst in bursts[shallow]])
    every = row_spacing(steps_T)
    reach = min(LEAD_REACH, float(np.median(distances)) / 2 if len(distances) else math.inf)
    reach_rows = max(1, min(round(reach / every), len(steps_T) // 4))
    lag, lag_interval, correlation = cross_lag(shallow_T, deep_T, reach_rows)
    return Lead(
        first_group=shallow,
        last_group=deep,
        per_event=tuple(per_event),
        median=middle,
        interval=interval,
        lag=lag * every,
        lag_interval=(lag_interval[0] * every, lag_interval[1] * every),
        correlation=correlation,
        shallow_first=middle > 0 and interval[0] > 0 and lag > 0 and lag_interval[0] > 0,
    )


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
    for index, peak in enumerate(peaks):
        low, high = peak - LEAD_REACH, peak + LEAD_REACH
        if index > 0:
            low = max(low, (peaks[index - 1] + peak) // 2)
        if index + 1 < len(peaks):
            high = min(high, (peak + peaks[index + 1]) // 2)
        moves = [_first_move(steps_T, x_T, low, high, window) for x_T in (shallow_T, deep_T)]
        if moves[0] is not None and moves[1] is not None:
            leads.append(moves[1] - moves[0])
    return leads


def _first_move(steps_T: Steps, grad_T: Array, low: int, high: int, window: int) -> int | None:
    """First of two rows in a row of [low, high] that stand out of what came before `low`."""
    rows = is_measured(grad_T)
    steps_T, log_T = steps_T[rows], log_of(grad_T[rows])
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


def cross_lag(
    shallow_T: Array, deep_T: Array, reach: int, seed: int = 0
) -> tuple[int, tuple[float, float], float]:
    """Lag (rows, positive: deep later) of the largest cross-correlation of two residual series.

    The residual is log |g| minus its running median over 201 rows.

    Args:
        shallow_T: gradient of the shallow layer.
        deep_T: gradient of the deep layer.
        reach: largest lag looked at, either way, in rows.
        seed: seed of the block bootstrap.

    Returns:
        The lag, its 95 % interval by resampling blocks of four times the reach, the correlation.
    """
    a_T, b_T = _residual(shallow_T), _residual(deep_T)
    lags = np.arange(-reach, reach + 1)
    norm = float(np.sqrt(np.sum(a_T * a_T) * np.sum(b_T * b_T)))
    if norm == 0 or len(a_T) <= 2 * reach:
        return 0, (math.nan, math.nan), 0.0
    block = max(4 * reach, 50)
    starts = range(0, len(a_T), block)
    sums_NL: Array = np.array(
        [[_lagged_product(a_T, b_T, s, s + block, int(lag)) for lag in lags] for s in starts]
    )
    best = int(np.argmax(sums_NL.sum(axis=0)))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(starts), [1 / len(starts)] * len(starts), RESAMPLES)
    resampled = lags[np.argmax(counts @ sums_NL, axis=1)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    correlation = float(sums_NL.sum(axis=0)[best]) / norm
    return int(lags[best]), (float(low), float(high)), correlation


def _residual(grad_T: Array) -> Array:
    log_T = log_of(grad_T)
    finite = np.flatnonzero(np.isfinite(log_T))
    if len(finite) == 0:
        return np.zeros(len(log_T))
    filled_T = np.interp(np.arange(len(log_T)), finite, log_T[finite])
    half = min(100, (len(filled_T) - 1) // 2)
    padded = np.pad(filled_T, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return filled_T - np.median(windows, axis=1)


def _lagged_product(a_T: Array, b_T: Array, start: int, end: int, lag: int) -> float:
    """Sum of a[t] * b[t + lag] for t in [start, end) where both exist."""
    start, end = max(start, -lag, 0), min(end, len(a_T), len(a_T) - lag)
    return float(np.dot(a_T[start:end], b_T[start + lag : end + lag])) if start < end else 0.0


def median_interval(values: Sequence[int], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % bootstrap interval; NaN without values."""
    if not values:
        return math.nan, (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    resampled = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(median(values)), (float(low), float(high))
