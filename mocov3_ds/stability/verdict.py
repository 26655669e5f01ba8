"""One word on a run's stability, and the numbers behind it: pure functions of logged series.

    judgement = judge(series)
    judgement.verdict      STABLE | TWITCHY | UNSTABLE | DEGRADING | RESTARTED | DIVERGED

The first word that applies, from the worst:

    DIVERGED    a value was not finite, the loss sits at its chance level, or the k-NN accuracy ends
                below half of its best
    RESTARTED   a sudden dip deeper than 30 % of the best accuracy so far that stays open for more
                than 2 % of the run: the partial restart of arXiv 2104.02057, Sec. 4.1
    DEGRADING   accuracy falls smoothly, without a gradient event: LAMB's failure (Fig. 3)
    UNSTABLE    a dip, or loss spikes on more than 0.1 % of the steps
    TWITCHY     gradient events without a dip
    STABLE      none of these

The instability score I is the share of accuracy-time lost to dips, in percent,

    I = 100 * sum_t max(0, M(t) - A(t) - 2 sigma_A) dt / sum_t M(t) dt

with A the 3-point median of the k-NN accuracy, M its running maximum and sigma_A the binomial error
of the probes: 0 = never below its own past, comparable across models, lengths and batch sizes. E, R
and T stand beside it and are never merged into it.

Shape suffixes: T = steps logged, K = k-NN evaluations, G = layer groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mocov3_ds.monitoring.alarms import RMS_HIGH, RULES
from mocov3_ds.stability import events
from mocov3_ds.stability.events import Burst

Array = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]
Verdict = Literal["STABLE", "TWITCHY", "UNSTABLE", "DEGRADING", "RESTARTED", "DIVERGED"]

LOST = 0.5
"""DIVERGED: the accuracy ends below this share of its best"""
AT_CHANCE = 0.98
"""DIVERGED: the loss comes back above this share of its chance level"""
AT_CHANCE_FOR = 0.01
"""for this share of the run, or is not finite in so many of its steps"""
AT_LEAST = 5
"""steps, in a run so short that the share is fewer: one skipped step is no divergence"""
LEFT_CHANCE = 0.95
"""share of the chance level below which a run counts as started"""
RESTART_DEPTH = 0.30
"""RESTARTED: share of the best accuracy that is lost at once"""
RESTART_FOR = 0.02
"""share of the run for which it stays lost"""
DECLINE_FOR = 0.05
"""DEGRADING: share of the run for which a smooth drawdown stays open"""
TREND_WINDOW = 0.10
"""or share of the run over which accuracy falls with a significant trend"""
TREND_P = 0.01
"""Mann-Kendall's p of that trend, divided by the number of windows that fit into the run"""
LR_TAIL = 0.10
"""trends are looked for until the learning rate has fallen to this share of its peak"""
SPIKE_SHARE = 0.001
"""UNSTABLE: share of steps whose loss is 7 deviations out (and at least two steps)"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """What a run logged, as plain arrays.

    Attributes:
        steps_T: optimizer steps done, ascending, one per logged row.
        loss_T: NaN or infinite where it was not finite.
        chance_loss: loss of a network that cannot tell its keys apart, 4 T ln N.
        lr_T: learning rate.
        groups: G layer groups from input to output.
        grad_linf_GT: largest gradient of each group; NaN where not measured or frozen.
        rms_GT: RMS of g / sqrt(v_t) of each group; NaN where not measured, frozen, or LARS.
        knn_steps_K: steps of the k-NN evaluations, ascending.
        knn_K: accuracy in percent.
        probes: images that each evaluation classifies; 0 if unknown (no binomial error then).
        knn_chance: accuracy in percent of guessing.
        total_steps: planned length of the run.
        stopped_non_finite: the run ended because a value was not finite.
        twin_knn: final accuracy in percent of the twin with a frozen patch projection, if any.
    """

    steps_T: Steps
    loss_T: Array
    chance_loss: float
    lr_T: Array
    groups: tuple[str, ...]
    grad_linf_GT: Array
    rms_GT: Array
    knn_steps_K: Steps
    knn_K: Array
    probes: int
    knn_chance: float
    total_steps: int
    stopped_non_finite: bool = False
    twin_knn: float | None = None


@dataclass(frozen=True)
class GradientEvent:
    """A burst of one group's gradient.

    Attributes:
        group: where.
        first: first step above the threshold.
        last: last step above it.
        peak: step of the largest gradient.
        ratio: largest gradient over the trailing median.
    """

    group: str
    first: int
    last: int
    peak: int
    ratio: float


@dataclass(frozen=True)
class LossEvent:
    """A jump of the loss above its trailing median.

    Attributes:
        first: its onset, the first step above the threshold.
        last: last step above it.
        peak: step of the largest loss.
        excess: largest loss over the trailing median, minus 1.
    """

    first: int
    last: int
    peak: int
    excess: float


@dataclass(frozen=True)
class Dip:
    """A drawdown of the k-NN curve.

    Attributes:
        first: step of the evaluation that opened it.
        last: step of the evaluation that closed it, or of the last one.
        lowest: step of the deepest evaluation.
        depth: points below the best accuracy before.
        relative_depth: the same as a share of that best.
        area: point-steps below the best.
        closed: whether accuracy came back.
        sudden: whether it fell within 3 % of the run or three evaluations.
        restart: whether it is a partial restart.
    """

    first: int
    last: int
    lowest: int
    depth: float
    relative_depth: float
    area: float
    closed: bool
    sudden: bool
    restart: bool


@dataclass(frozen=True)
class Decline:
    """A smooth fall of the k-NN curve without a gradient event in it.

    Attributes:
        first: first step.
        last: last step.
        fall: points lost between them.
        p: Mann-Kendall's p of the falling trend; NaN where a long drawdown told it.
    """

    first: int
    last: int
    fall: float
    p: float


@dataclass(frozen=True)
class Lead:
    """How far the first trained layer's gradient is ahead of the last block's, in steps.

    Positive: the shallow layer moves first. Intervals are 95 % bootstrap ones.

    Attributes:
        first_group: the shallow group.
        last_group: the deep group.
        per_event: lead of each gradient event that both groups show.
        median: of these; NaN without events.
        interval: of the median.
        lag: where the cross-correlation of the two residual series is largest.
        lag_interval: of that lag.
        correlation: at that lag.
        shallow_first: whether median and lag are both above 0 with their intervals: only then may
            the order "first layer first" be claimed.
    """

    first_group: str
    last_group: str
    per_event: tuple[int, ...]
    median: float
    interval: tuple[float, float]
    lag: int
    lag_interval: tuple[float, float]
    correlation: float
    shallow_first: bool


@dataclass(frozen=True)
class AlarmQuality(events.Foretold):
    """How well one alarm of one layer group foretold the loss events.

    Attributes:
        alarm: its name in `monitor.alarm.RULES`.
        group: the layer group it watches.
    """

    alarm: str
    group: str


@dataclass(frozen=True)
class Judgement:
    """What `judge` found.

    Attributes:
        verdict: the word.
        why: one sentence with the numbers that decided.
        instability: I in percent; NaN without k-NN evaluations.
        events_per_1000: E, gradient events (of any group, merged) per 1000 logged steps.
        rms_share: R, share of the steps with RMS_t of the patch projection above 2.3; NaN where it
            is frozen or has no second moment.
        lost_to_twin: T, final accuracy of the frozen twin minus this run's, points; None without.
        spike_score: share of steps whose loss is 7 standard deviations above the rolling mean.
        steps_above_3_2: the same count with 3.2 deviations, for comparison with arXiv 2304.13013.
        best_knn: best 3-point median, percent; NaN without evaluations.
        final_knn: median of the last three evaluations, percent; NaN without.
        final_loss: median of the last tenth.
        gradient_events: of each group, by first step.
        loss_events: by first step.
        dips: by first step.
        declines: by first step.
        lead: first trained layer against the last block; None with fewer than two such groups.
        alarms: quality of each alarm rule on the first trained group.
        notes: what could not be judged, e.g. too short a history; one sentence each.
    """

    verdict: Verdict
    why: str
    instability: float
    events_per_1000: float
    rms_share: float
    lost_to_twin: float | None
    spike_score: float
    steps_above_3_2: int
    best_knn: float
    final_knn: float
    final_loss: float
    gradient_events: tuple[GradientEvent, ...]
    loss_events: tuple[LossEvent, ...]
    dips: tuple[Dip, ...]
    declines: tuple[Decline, ...]
    lead: Lead | None
    alarms: tuple[AlarmQuality, ...]
    notes: tuple[str, ...]


def judge(series: Series) -> Judgement:
    """Apply every detector and name the verdict.

    Raises:
        ValueError: arrays of different lengths, or steps that do not ascend.
    """
    _check(series)
    window = events.window_of(series.total_steps)
    bursts = {
        group: events.gradient_bursts(series.steps_T, grad_T, window)
        for group, grad_T in zip(series.groups, series.grad_linf_GT, strict=True)
    }
    of_run = events.union(
        [burst for group in bursts.values() for burst in group],
        events.merge_within(_gradient_steps(series)),
    )
    jumps = events.loss_jumps(series.steps_T, series.loss_T)
    dips = _dips(series)
    declines = _declines(series, of_run)
    spikes = events.steps_above(series.loss_T, events.SPIKE_Z)
    verdict, why = _verdict(series, dips, declines, of_run, jumps, spikes)
    best, final = _accuracies(series)
    first = next((g for g in _watched(series) if g != "cls"), None)
    return Judgement(
        verdict=verdict,
        why=why,
        instability=instability(series),
        events_per_1000=1000 * len(of_run) / max(len(series.steps_T), 1),
        rms_share=_rms_share(series),
        lost_to_twin=None if series.twin_knn is None else series.twin_knn - final,
        spike_score=spikes / max(len(series.steps_T), 1),
        steps_above_3_2=events.steps_above(series.loss_T, events.PAPER_Z),
        best_knn=best,
        final_knn=final,
        final_loss=_final(series.loss_T),
        gradient_events=tuple(
            sorted(
                (
                    GradientEvent(group, burst.first, burst.last, burst.peak, burst.size)
                    for group, found in bursts.items()
                    for burst in found
                ),
                key=lambda event: event.first,
            )
        ),
        loss_events=tuple(LossEvent(j.first, j.last, j.peak, j.size) for j in jumps),
        dips=dips,
        declines=declines,
        lead=_lead(series, bursts, window),
        alarms=() if first is None else _alarms(series, first, [jump.first for jump in jumps]),
        notes=tuple(_notes(series)),
    )


def instability(series: Series) -> float:
    """I, the share of accuracy-time lost to dips, in percent; NaN without evaluations.

    After a run stopped at a value that was not finite, accuracy counts as chance to the planned
    end.
    """
    steps_K, a_K = series.knn_steps_K, events.smoothed(series.knn_K)
    if len(a_K) == 0:
        return math.nan
    if series.stopped_non_finite and series.total_steps > steps_K[-1]:
        steps_K = np.append(steps_K, series.total_steps)
        a_K = np.append(a_K, min(series.knn_chance, float(a_K[-1])))
    best_K = np.maximum.accumulate(a_K)
    dt_K = np.diff(steps_K, prepend=0).astype(float)
    excess_K = best_K - a_K - 2 * events.binomial_error(best_K, series.probes)
    whole = float(np.sum(best_K * dt_K))
    return 100 * float(np.sum(np.maximum(excess_K, 0.0) * dt_K)) / whole if whole else math.nan


def _check(series: Series) -> None:
    rows, groups = len(series.steps_T), len(series.groups)
    for name, array, shape in (
        ("loss_T", series.loss_T, (rows,)),
        ("lr_T", series.lr_T, (rows,)),
        ("grad_linf_GT", series.grad_linf_GT, (groups, rows)),
        ("rms_GT", series.rms_GT, (groups, rows)),
        ("knn_K", series.knn_K, (len(series.knn_steps_K),)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, it must be {shape}.")
    for name, steps in (("steps_T", series.steps_T), ("knn_steps_K", series.knn_steps_K)):
        if np.any(np.diff(steps) <= 0):
            raise ValueError(f"{name} must ascend.")


def _dips(series: Series) -> tuple[Dip, ...]:
    steps_K, a_K = series.knn_steps_K, events.smoothed(series.knn_K)
    best_K = np.maximum.accumulate(a_K) if len(a_K) else a_K
    dt_K = np.diff(steps_K, prepend=0)
    dips = []
    for found in events.drawdowns(steps_K, series.knn_K, series.probes, series.total_steps):
        inside = slice(found.first, found.last + 1)
        depth = float(best_K[found.lowest] - a_K[found.lowest])
        relative = depth / float(best_K[found.lowest])
        first, last = int(steps_K[found.first]), int(steps_K[found.last])
        long = last - first > RESTART_FOR * series.total_steps
        dips.append(
            Dip(
                first=first,
                last=last,
                lowest=int(steps_K[found.lowest]),
                depth=depth,
                relative_depth=relative,
                area=float(np.sum((best_K - a_K)[inside] * dt_K[inside])),
                closed=found.closed,
                sudden=found.sudden,
                restart=found.sudden and relative > RESTART_DEPTH and long,
            )
        )
    return tuple(dips)


def _declines(series: Series, bursts: Sequence[Burst]) -> tuple[Decline, ...]:
    """Long smooth drawdowns, and significant falling trends; none with a gradient event inside."""
    found = []
    for dip in _dips(series):
        long = dip.last - dip.first > DECLINE_FOR * series.total_steps
        if long and not dip.sudden and not _burst_in(bursts, dip.first, dip.lowest, series):
            found.append(Decline(dip.first, dip.lowest, dip.depth, math.nan))
    trends = [trend for trend in _trends(series) if not _overlaps(trend, found)]
    found += [t for t in trends if not _burst_in(bursts, t.first, t.last, series)]
    return tuple(sorted(found, key=lambda decline: decline.first))


def _burst_in(bursts: Sequence[Burst], first: int, last: int, series: Series) -> bool:
    """Whether a gradient event lies in a fall, or shortly before it began."""
    low = first - DECLINE_FOR * series.total_steps
    return any(low <= burst.first <= last for burst in bursts)


def _overlaps(trend: Decline, others: Sequence[Decline]) -> bool:
    return any(trend.first <= other.last and other.first <= trend.last for other in others)


def _trends(series: Series) -> list[Decline]:
    """Windows of a tenth of the run in which the accuracy itself, not its median, falls."""
    steps_K, knn_K = series.knn_steps_K, series.knn_K
    width = TREND_WINDOW * series.total_steps
    end = _lr_tail(series)
    found: list[Decline] = []
    for start in range(len(steps_K)):
        last = int(np.searchsorted(steps_K, steps_K[start] + width, side="right"))
        part, third = knn_K[start:last], (last - start) // 3
        if last == len(steps_K) and steps_K[-1] - steps_K[start] < 0.9 * width:
            break
        if steps_K[last - 1] > end or third < 2:
            continue
        fall = float(np.mean(part[:third]) - np.mean(part[-third:]))
        if fall < float(events.dip_threshold(float(np.max(part)), series.probes)) / 2:
            continue
        p = events.mann_kendall(part)
        if p >= TREND_P * TREND_WINDOW:
            continue
        trend = Decline(int(steps_K[start]), int(steps_K[last - 1]), fall, p)
        if found and trend.first <= found[-1].last:  # one fall, seen by several windows
            one = found[-1]
            trend = Decline(one.first, trend.last, max(one.fall, fall), min(one.p, p))
            found[-1] = trend
        else:
            found.append(trend)
    return found


def _lr_tail(series: Series) -> float:
    """Step from which the learning rate is in its tail."""
    lr_T = np.nan_to_num(series.lr_T)
    if len(lr_T) == 0 or lr_T.max() == 0:
        return math.inf
    top = int(np.argmax(lr_T))
    tail = np.flatnonzero(lr_T[top:] < LR_TAIL * lr_T[top])
    return float(series.steps_T[top + tail[0]]) if len(tail) else math.inf


def _verdict(
    series: Series,
    dips: Sequence[Dip],
    declines: Sequence[Decline],
    bursts: Sequence[Burst],
    jumps: Sequence[Burst],
    spikes: int,
) -> tuple[Verdict, str]:
    diverged = _divergence(series)
    if diverged:
        return "DIVERGED", diverged
    restarts = [dip for dip in dips if dip.restart]
    if restarts:
        worst = max(restarts, key=lambda dip: dip.relative_depth)
        return "RESTARTED", (
            f"the k-NN accuracy lost {worst.depth:.1f} points ({100 * worst.relative_depth:.0f} % "
            f"of its best) at once, open from step {worst.first} to {worst.last}"
        )
    if declines:
        most = max(declines, key=lambda decline: decline.fall)
        return "DEGRADING", (
            f"the k-NN accuracy fell smoothly by {most.fall:.1f} points from step {most.first} to "
            f"{most.last}, without a gradient event"
        )
    share = spikes / max(len(series.steps_T), 1)
    if dips:
        deepest = max(dips, key=lambda dip: dip.depth)
        return "UNSTABLE", (
            f"{_many(len(dips), 'dip')} of the k-NN accuracy, the deepest of {deepest.depth:.1f} "
            f"points at step {deepest.lowest}"
        )
    if spikes >= 2 and share > SPIKE_SHARE:
        return "UNSTABLE", (
            f"the loss of {spikes} steps ({100 * share:.2f} %) is 7 deviations above its rolling "
            "mean"
        )
    if bursts or jumps:
        return "TWITCHY", (
            f"{_many(len(bursts), 'gradient event')} and {_many(len(jumps), 'loss event')}, no dip "
            "of the k-NN accuracy"
        )
    return "STABLE", "no gradient event, no loss event, no dip and no decline"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _divergence(series: Series) -> str:
    """Why the run counts as diverged; empty if it does not."""
    loss_T = series.loss_T
    if series.stopped_non_finite or (len(loss_T) and not np.isfinite(loss_T[-1])):
        step = int(series.steps_T[-1]) if len(loss_T) else 0
        return f"a value was not finite after step {step}"
    bad = int(np.sum(~np.isfinite(loss_T)))
    if bad >= max(AT_CHANCE_FOR * len(loss_T), AT_LEAST):
        return f"the loss of {bad} steps was not finite"
    started = np.flatnonzero(loss_T < LEFT_CHANCE * series.chance_loss)
    high_T = loss_T > AT_CHANCE * series.chance_loss
    if len(started):
        rows = max(AT_CHANCE_FOR * series.total_steps, AT_LEAST)
        longest = _longest_true(high_T[started[0] :])
        if longest >= rows:
            return f"the loss was back at its chance level for {longest} steps"
    elif len(loss_T) and series.steps_T[-1] >= 0.9 * series.total_steps and high_T[-1]:
        return "the loss never left its chance level"
    best, final = _accuracies(series)
    if final < LOST * best:
        return f"the k-NN accuracy ended at {final:.1f} % after a best of {best:.1f} %"
    return ""


def _longest_true(flags: npt.NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int(np.max(edges[1::2] - edges[::2], initial=0))


def _accuracies(series: Series) -> tuple[float, float]:
    """Best 3-point median, and median of the last three evaluations; NaN without evaluations."""
    if len(series.knn_K) == 0:
        return math.nan, math.nan
    return float(np.max(events.smoothed(series.knn_K))), float(np.median(series.knn_K[-3:]))


def _final(loss_T: Array) -> float:
    finite = loss_T[-max(len(loss_T) // 10, 1) :]
    finite = finite[np.isfinite(finite)]
    return float(np.median(finite)) if len(finite) else math.nan


def _rms_share(series: Series) -> float:
    if "patch_embed" not in series.groups:
        return math.nan
    rms_T = series.rms_GT[series.groups.index("patch_embed")]
    rms_T = rms_T[~np.isnan(rms_T)]
    return float(np.mean(rms_T > RMS_HIGH)) if len(rms_T) else math.nan


def _gradient_steps(series: Series) -> Steps:
    """Steps at which gradients were measured, (T,); every one of them at `--signals.every 1`."""
    if not series.groups:
        return series.steps_T
    steps_T: Steps = series.steps_T[events.measured(*series.grad_linf_GT)]
    return steps_T


def _watched(series: Series) -> list[str]:
    """Groups whose gradient was measured, from input to output."""
    return [
        group
        for group, grad_T in zip(series.groups, series.grad_linf_GT, strict=True)
        if np.isfinite(grad_T).any()
    ]


def _lead(series: Series, bursts: dict[str, list[Burst]], window: int) -> Lead | None:
    """The first trained layer (the class token is none) against the last block."""
    layers = [g for g in _watched(series) if g == "patch_embed" or g.startswith("block_")]
    if len(layers) < 2:
        return None
    first, last = layers[0], layers[-1]
    a_T, b_T = (series.grad_linf_GT[series.groups.index(group)] for group in (first, last))
    rows = events.measured(a_T, b_T)
    steps_T, a_T, b_T = series.steps_T[rows], a_T[rows], b_T[rows]
    per_event = events.leads(steps_T, a_T, b_T, bursts[first], window)
    middle, interval = events.median_interval(per_event)
    spacing = np.diff([burst.peak for burst in bursts[first]])
    every = events.spacing(steps_T)
    reach = min(events.LEAD_REACH, float(np.median(spacing)) / 2 if len(spacing) else math.inf)
    reach_rows = max(1, min(round(reach / every), len(steps_T) // 4))
    lag, lag_interval, correlation = events.cross_lag(a_T, b_T, reach_rows)
    return Lead(
        first_group=first,
        last_group=last,
        per_event=tuple(per_event),
        median=middle,
        interval=interval,
        lag=lag * every,
        lag_interval=(lag_interval[0] * every, lag_interval[1] * every),
        correlation=correlation,
        shallow_first=middle > 0 and interval[0] > 0 and lag > 0 and lag_interval[0] > 0,
    )


def _alarms(series: Series, group: str, onsets: list[int]) -> tuple[AlarmQuality, ...]:
    place = series.groups.index(group)
    rms_T, grad_T = series.rms_GT[place], series.grad_linf_GT[place]
    rows = events.measured(rms_T, grad_T)
    steps_T, rms_T, grad_T = series.steps_T[rows], rms_T[rows], grad_T[rows]
    qualities = []
    for name, rule in RULES.items():
        flags_T = rule(rms_T, grad_T)
        found = events.foretold(steps_T, flags_T, onsets)
        qualities.append(AlarmQuality(alarm=name, group=group, **vars(found)))
    return tuple(qualities)


def _notes(series: Series) -> list[str]:
    notes = []
    rows, done = len(series.steps_T), int(series.steps_T[-1]) if len(series.steps_T) else 0
    if done < series.total_steps:
        notes.append(f"judged after {done} of {series.total_steps} steps")
    if rows <= events.HISTORY:
        notes.append(f"{rows} logged steps are too few for gradient and loss events")
    if len(series.knn_K) == 0:
        notes.append("no k-NN evaluations, so dips and declines cannot be seen")
    elif series.probes == 0:
        notes.append("the number of probes is unknown, so dips count from 1 point on")
    elif len(series.knn_K) < 20:
        notes.append(f"{len(series.knn_K)} k-NN evaluations are few: short dips fall between them")
    if not _watched(series):
        notes.append("no gradients were logged, so no gradient events, leads and alarms")
    elif (every := events.spacing(_gradient_steps(series))) > events.spacing(series.steps_T):
        notes.append(
            f"gradients were measured every {every} steps: events shorter than {2 * every} steps "
            f"and those before step {events.HISTORY * every} cannot be seen, leads and alarms are "
            f"{every} steps coarse"
        )
    bad = int(np.sum(~np.isfinite(series.loss_T)))
    if bad:
        notes.append(f"the loss of {bad} steps was not finite")
    return notes
