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
from collections.abc import Mapping, Sequence

import numpy as np

from mocov3_ds.monitoring.alarms import RMS_HIGH
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import events, knn_curve
from mocov3_ds.stability.alarm_quality import judge_alarms
from mocov3_ds.stability.findings import (
    Array,
    Decline,
    Dip,
    GradientEvent,
    Judgement,
    LossEvent,
    Series,
    Steps,
    Verdict,
)
from mocov3_ds.stability.layer_order import measure_lead
from mocov3_ds.stability.trailing import is_measured, longest_run, row_spacing, window_length

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
SPIKE_SHARE = 0.001
"""UNSTABLE: share of steps whose loss is 7 deviations out (and at least two steps)"""
_FEW_EVALUATIONS = 20


def judge(series: Series) -> Judgement:
    """Apply every detector and name the verdict.

    Raises:
        ValueError: arrays have different lengths, or steps do not ascend.
    """
    _check_arrays(series)
    window = window_length(series.total_steps, events.WINDOW)
    bursts = {
        group: events.gradient_bursts(series.steps_T, grad_T, window)
        for group, grad_T in zip(series.groups, series.grad_linf_GT, strict=True)
    }
    run_bursts = events.merge_excursions(
        [burst for group in bursts.values() for burst in group],
        events.merge_distance(_gradient_steps(series)),
    )
    jumps = events.loss_jumps(series.steps_T, series.loss_T)
    dips = knn_curve.find_dips(series)
    declines = knn_curve.find_declines(series, dips, run_bursts)
    spikes = events.count_spikes(series.loss_T, events.SPIKE_Z)
    verdict, why = _name_verdict(series, dips, declines, run_bursts, jumps, spikes)
    best, final = knn_curve.best_and_final_accuracy(series)
    rows = max(len(series.steps_T), 1)
    layer = series.first_trained_layer()
    onsets = [jump.first for jump in jumps]
    return Judgement(
        verdict=verdict,
        why=why,
        instability=knn_curve.instability(series),
        events_per_1000=1000 * len(run_bursts) / rows,
        rms_share=_rms_share(series),
        lost_to_twin=None if series.twin_knn is None else series.twin_knn - final,
        spike_score=spikes / rows,
        steps_above_3_2=events.count_spikes(series.loss_T, events.PAPER_Z),
        best_knn=best,
        final_knn=final,
        final_loss=_final_loss(series.loss_T),
        gradient_events=_gradient_events(bursts),
        loss_events=tuple(LossEvent(j.first, j.last, j.peak, j.size) for j in jumps),
        dips=dips,
        declines=declines,
        lead=measure_lead(series, bursts, window),
        alarms=() if layer is None else judge_alarms(series, layer, onsets),
        notes=tuple(_list_notes(series)),
    )


def _check_arrays(series: Series) -> None:
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


def _gradient_events(bursts: Mapping[str, Sequence[events.Excursion]]) -> tuple[GradientEvent, ...]:
    """Events of all groups, by first step."""
    events = [
        GradientEvent(group, burst.first, burst.last, burst.peak, burst.size)
        for group, group_bursts in bursts.items()
        for burst in group_bursts
    ]
    return tuple(sorted(events, key=lambda event: event.first))


def _name_verdict(
    series: Series,
    dips: Sequence[Dip],
    declines: Sequence[Decline],
    bursts: Sequence[events.Excursion],
    jumps: Sequence[events.Excursion],
    spikes: int,
) -> tuple[Verdict, str]:
    """The word, and one sentence with the numbers that decided."""
    divergence = _explain_divergence(series)
    if divergence:
        return "DIVERGED", divergence
    restarts = [dip for dip in dips if dip.restart]
    if restarts:
        worst = max(restarts, key=lambda dip: dip.relative_depth)
        return "RESTARTED", (
            f"the k-NN accuracy lost {worst.depth:.1f} points ({100 * worst.relative_depth:.0f} % "
            f"of its best) at once, open from step {worst.first} to {worst.last}"
        )
    if declines:
        steepest = max(declines, key=lambda decline: decline.fall)
        return "DEGRADING", (
            f"the k-NN accuracy fell smoothly by {steepest.fall:.1f} points from step "
            f"{steepest.first} to {steepest.last}, without a gradient event"
        )
    if dips:
        deepest = max(dips, key=lambda dip: dip.depth)
        return "UNSTABLE", (
            f"{count_noun(len(dips), 'dip')} of the k-NN accuracy, the deepest of "
            f"{deepest.depth:.1f} points at step {deepest.lowest}"
        )
    share = spikes / max(len(series.steps_T), 1)
    if spikes >= 2 and share > SPIKE_SHARE:
        return "UNSTABLE", (
            f"the loss of {spikes} steps ({100 * share:.2f} %) is 7 deviations above its rolling "
            "mean"
        )
    if bursts or jumps:
        return "TWITCHY", (
            f"{count_noun(len(bursts), 'gradient event')} and "
            f"{count_noun(len(jumps), 'loss event')}, no dip of the k-NN accuracy"
        )
    return "STABLE", "no gradient event, no loss event, no dip and no decline"


def _explain_divergence(series: Series) -> str:
    """Why the run counts as diverged; empty if it does not."""
    loss_T = series.loss_T
    if series.stopped_non_finite or (len(loss_T) and not np.isfinite(loss_T[-1])):
        step = int(series.steps_T[-1]) if len(loss_T) else 0
        return f"a value was not finite after step {step}"
    bad = int(np.sum(~np.isfinite(loss_T)))
    if bad >= max(AT_CHANCE_FOR * len(loss_T), AT_LEAST):
        return f"the loss of {bad} steps was not finite"
    started = np.flatnonzero(loss_T < LEFT_CHANCE * series.chance_loss)
    at_chance_T = loss_T > AT_CHANCE * series.chance_loss
    if len(started):
        longest = longest_run(at_chance_T[started[0] :])
        if longest >= max(AT_CHANCE_FOR * series.total_steps, AT_LEAST):
            return f"the loss was back at its chance level for {longest} steps"
    elif len(loss_T) and series.steps_T[-1] >= 0.9 * series.total_steps and at_chance_T[-1]:
        return "the loss never left its chance level"
    best, final = knn_curve.best_and_final_accuracy(series)
    if final < LOST * best:
        return f"the k-NN accuracy ended at {final:.1f} % after a best of {best:.1f} %"
    return ""


def _final_loss(loss_T: Array) -> float:
    tail_T = loss_T[-max(len(loss_T) // 10, 1) :]
    tail_T = tail_T[np.isfinite(tail_T)]
    return float(np.median(tail_T)) if len(tail_T) else math.nan


def _rms_share(series: Series) -> float:
    if "patch_embed" not in series.groups:
        return math.nan
    rms_T = series.rms_of("patch_embed")
    rms_T = rms_T[~np.isnan(rms_T)]
    return float(np.mean(rms_T > RMS_HIGH)) if len(rms_T) else math.nan


def _gradient_steps(series: Series) -> Steps:
    """Steps at which gradients were measured, (T,); every one of them at `--signals.every 1`."""
    if not series.groups:
        return series.steps_T
    return series.steps_T[is_measured(*series.grad_linf_GT)]


def _list_notes(series: Series) -> list[str]:
    """What could not be judged, one sentence each."""
    notes = []
    rows, last = len(series.steps_T), int(series.steps_T[-1]) if len(series.steps_T) else 0
    if last < series.total_steps:
        notes.append(f"judged after {last} of {series.total_steps} steps")
    if rows <= events.HISTORY:
        notes.append(f"{rows} logged steps are too few for gradient and loss events")
    if len(series.knn_K) == 0:
        notes.append("no k-NN evaluations, so dips and declines cannot be seen")
    elif series.probes == 0:
        notes.append("the number of probes is unknown, so dips count from 1 point on")
    elif len(series.knn_K) < _FEW_EVALUATIONS:
        notes.append(f"{len(series.knn_K)} k-NN evaluations are few: short dips fall between them")
    if not series.trained_groups():
        notes.append("no gradients were logged, so no gradient events, leads and alarms")
    elif (every := row_spacing(_gradient_steps(series))) > row_spacing(series.steps_T):
        notes.append(
            f"gradients were measured every {every} steps: events shorter than {2 * every} steps "
            f"and those before step {events.HISTORY * every} cannot be seen, leads and alarms are "
            f"{every} steps coarse"
        )
    bad = int(np.sum(~np.isfinite(series.loss_T)))
    if bad:
        notes.append(f"the loss of {bad} steps was not finite")
    return notes
