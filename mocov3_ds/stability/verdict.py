"""One word on a run's stability, and the numbers behind it: pure functions of logged series.

    judgement = judge(series)
    judgement.verdict      one word, the first that applies, from the worst

    DIVERGED        a value was not finite, the loss sits at its chance level, or the k-NN accuracy
                    ends below half of its best
    NOT LEARNING    it ends no better than before training, or than guessing, without a fall
    RESTARTED       a sudden dip of more than a fifth of the accuracy that is not made good for
                    2 % of the run: the partial restart of arXiv 2104.02057, Sec. 4.1
    DEGRADING       accuracy falls slowly for 5 % of the run or more: LAMB's failure (Fig. 3)
    UNSTABLE        another dip, or loss spikes on more than 0.1 % of the steps
    BELOW ITS TWIN  no event, but the frozen twin, or another arm at the same seed, ends higher by
                    more than the noise of such a difference
    TWITCHY         gradient or loss events without a dip
    NOT LOOKED      nothing was found, and too little is logged to look for dips, or for events of
                    the loss
    STABLE          all were looked for, and none was found; where no gradients are logged it says
                    so

What is a dip, a decline or an event follows from the noise of the series itself, such that one
quiet run in a hundred has one, whatever its length (`drops`, `outliers`).

The instability score I is the share of accuracy-time lost to dips and declines, in percent,

    I = 100 * sum_t (M(t) - A(t)) dt / sum_t M(t) dt        over the steps of dips and declines,

with A the k-NN accuracy and M its level before the fall (elsewhere M is A). What noise alone loses
is not in it, so 0 is what a quiet run of any length has. E, R and T stand beside it and are never
merged into it.

Shape suffixes: T = steps logged, K = k-NN evaluations, G = layer groups.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mocov3_ds.monitoring.alarms import RMS_HIGH
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import events, knn_curve
from mocov3_ds.stability.alarm_quality import judge_alarms
from mocov3_ds.stability.drops import FEWEST, smallest_dip
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
from mocov3_ds.stability.knn_curve import CurveFindings
from mocov3_ds.stability.layer_order import measure_lead
from mocov3_ds.stability.references import (
    explain_behind,
    explain_no_learning,
    explain_unknown_learning,
    note_behind,
)
from mocov3_ds.stability.repeated_rows import keep_last_rows
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
FEWEST_STEPS = 2 * events.HISTORY
"""logged steps below which no gradient or loss event can be told from noise"""
_FEW_EVALUATIONS = 50


def judge(series: Series) -> Judgement:
    """Apply every detector and name the verdict.

    Of a step that was logged more than once the last row counts.

    Raises:
        ValueError: arrays have different lengths.
    """
    _check_arrays(series)
    series, repeated = keep_last_rows(series)
    window = window_length(series.total_steps, events.WINDOW)
    bursts_of_groups = events.gradient_bursts(series.steps_T, series.grad_linf_GT, window)
    bursts = dict(zip(series.groups, bursts_of_groups, strict=True))
    run_bursts = events.merge_excursions(
        [burst for group in bursts_of_groups for burst in group],
        events.merge_distance(_gradient_steps(series)),
    )
    jumps = events.loss_jumps(series.steps_T, series.loss_T)
    curve = knn_curve.examine_curve(series)
    spikes = _count_spikes(series, jumps)
    final_loss = _final_loss(series.loss_T)
    best, final = knn_curve.best_and_final_accuracy(series)
    shallowest = smallest_dip(series.knn_K, curve.noise)
    not_looked = _list_not_looked(series)
    if unknown := explain_unknown_learning(series, curve.noise, final):
        not_looked.append(unknown)
    verdict, why = (
        _explain_failure(series, curve, final, final_loss)
        or _explain_falls(curve)
        or _explain_events(series, curve, final, (run_bursts, jumps, spikes))
        or _explain_quiet(series, not_looked)
    )
    rows = max(len(series.steps_T), 1)
    layer = series.first_trained_layer()
    return Judgement(
        verdict=verdict,
        why=why,
        instability=curve.lost,
        events_per_1000=1000 * len(run_bursts) / rows,
        rms_share=_rms_share(series),
        lost_to_twin=None if series.twin_knn is None else series.twin_knn - final,
        spike_score=spikes / rows,
        steps_above_3_2=int(np.sum(events.flag_spikes(series.loss_T, events.PAPER_Z))),
        best_knn=best,
        final_knn=final,
        final_loss=final_loss,
        gradient_events=_gradient_events(bursts),
        loss_events=tuple(LossEvent(j.first, j.last, j.peak, j.size) for j in jumps),
        dips=curve.dips,
        declines=curve.declines,
        lead=measure_lead(series, bursts, window),
        alarms=() if layer is None else judge_alarms(series, layer, [jump.first for jump in jumps]),
        notes=(
            *_list_notes(series, shallowest, repeated),
            *note_behind(series, curve.noise, final),
        ),
        not_looked=tuple(not_looked),
        knn_noise=curve.noise.deviation if len(series.knn_K) else math.nan,
        smallest_dip=shallowest,
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


def _gradient_events(bursts: Mapping[str, Sequence[events.Excursion]]) -> tuple[GradientEvent, ...]:
    """Events of all groups, by first step."""
    events = [
        GradientEvent(group, burst.first, burst.last, burst.peak, burst.size)
        for group, group_bursts in bursts.items()
        for burst in group_bursts
    ]
    return tuple(sorted(events, key=lambda event: event.first))


def _count_spikes(series: Series, jumps: Sequence[events.Excursion]) -> int:
    """Steps of loss events whose loss is 7 deviations above the rolling mean of those before."""
    spikes_T = events.flag_spikes(series.loss_T, events.SPIKE_Z)
    inside_T = np.zeros(len(series.steps_T), bool)
    for jump in jumps:
        inside_T |= (series.steps_T >= jump.first) & (series.steps_T <= jump.last)
    return int(np.sum(spikes_T & inside_T))


Named = tuple[Verdict, str]
"""a verdict, and one sentence with the numbers that decided"""


def _explain_failure(
    series: Series, curve: CurveFindings, final: float, final_loss: float
) -> Named | None:
    """The run led nowhere."""
    if divergence := _explain_divergence(series):
        return "DIVERGED", divergence
    falls: tuple[Dip | Decline, ...] = (*curve.dips, *curve.declines)
    if nothing := explain_no_learning(series, curve.noise, final, final_loss, falls):
        return "NOT LEARNING", nothing
    return None


def _explain_falls(curve: CurveFindings) -> Named | None:
    """The k-NN accuracy fell."""
    restarts = [dip for dip in curve.dips if dip.restart]
    if restarts:
        worst = max(restarts, key=lambda dip: dip.relative_depth)
        return "RESTARTED", (
            f"the k-NN accuracy lost {worst.depth:.1f} points ({100 * worst.relative_depth:.0f} % "
            f"of what it was) at once, open from step {worst.first} to {worst.last}"
        )
    if curve.declines:
        steepest = max(curve.declines, key=lambda decline: decline.fall)
        return "DEGRADING", (
            f"the k-NN accuracy fell slowly by {steepest.fall:.1f} points from step "
            f"{steepest.first} to {steepest.last}"
        )
    if curve.dips:
        deepest = max(curve.dips, key=lambda dip: dip.depth)
        return "UNSTABLE", (
            f"{count_noun(len(curve.dips), 'dip')} of the k-NN accuracy, the deepest of "
            f"{deepest.depth:.1f} points at step {deepest.lowest} (noise of an evaluation: "
            f"{curve.noise.deviation:.1f})"
        )
    return None


def _explain_events(
    series: Series,
    curve: CurveFindings,
    final: float,
    found: tuple[Sequence[events.Excursion], Sequence[events.Excursion], int],
) -> Named | None:
    """Gradients or the loss jumped, or the run ends lower than another one.

    `found` are gradient events, loss events, and the count of steps with spikes of the loss.
    """
    bursts, jumps, spikes = found
    share = spikes / max(len(series.steps_T), 1)
    if len(jumps) >= 2 and spikes >= 2 and share > SPIKE_SHARE:
        return "UNSTABLE", (
            f"the loss of {spikes} steps ({100 * share:.2f} %) is 7 deviations above its rolling "
            "mean"
        )
    if behind := explain_behind(series, curve.noise, final):
        return "BELOW ITS TWIN", behind
    if bursts or jumps:
        fell = (
            "no dip of the k-NN accuracy"
            if len(series.knn_K) >= FEWEST
            else "dips of the k-NN accuracy were not looked for"
        )
        of_gradients = f"{count_noun(len(bursts), 'gradient event')} and "
        return "TWITCHY", (
            f"{of_gradients if series.trained_groups() else ''}"
            f"{count_noun(len(jumps), 'loss event')}, {fell}"
        )
    return None


def _explain_quiet(series: Series, not_looked: Sequence[str]) -> Named:
    """Nothing was found, and perhaps not all was looked for."""
    if not_looked:
        return "NOT LOOKED", "nothing was found, but " + "; ".join(not_looked)
    if series.trained_groups():
        return "STABLE", "no gradient event, no loss event, no dip and no decline"
    return "STABLE", "no loss event, no dip and no decline; gradients were not logged"


def _list_not_looked(series: Series) -> list[str]:
    """What could not be looked for at all, and what it would take."""
    missing = []
    evaluations, rows = len(series.knn_K), len(series.steps_T)
    if evaluations < FEWEST:
        missing.append(
            f"no dip or decline was looked for: {count_noun(evaluations, 'k-NN evaluation')}, "
            f"{FEWEST} are needed"
        )
    if not series.has_loss:
        missing.append("no loss event was looked for: no loss is logged")
    elif rows < FEWEST_STEPS:
        missing.append(
            f"no gradient or loss event was looked for: {count_noun(rows, 'logged step')}, "
            f"{FEWEST_STEPS} are needed"
        )
    return missing


def _explain_divergence(series: Series) -> str:
    """Why the run counts as diverged; empty if it does not."""
    if series.has_loss and (sentence := _explain_diverged_loss(series)):
        return sentence
    if series.non_finite_end:
        return series.non_finite_end
    best, final = knn_curve.best_and_final_accuracy(series)
    if final < LOST * best:
        return f"the k-NN accuracy ended at {final:.1f} % after a best of {best:.1f} %"
    return ""


def _explain_diverged_loss(series: Series) -> str:
    """Why the loss counts as diverged; empty if it does not."""
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


def _list_notes(series: Series, shallowest: float, repeated: int) -> list[str]:
    """What could not be judged, or only in part, one sentence each."""
    notes = _list_not_looked(series)
    last = int(series.steps_T[-1]) if len(series.steps_T) else 0
    if last < series.total_steps:
        notes.append(f"judged after {last} of {series.total_steps} steps")
    if repeated:
        notes.append(f"{count_noun(repeated, 'row')} of steps logged again later did not count")
    if FEWEST <= len(series.knn_K) < _FEW_EVALUATIONS:
        notes.append(
            f"{len(series.knn_K)} k-NN evaluations are few: dips that last shorter than three of "
            f"them, or are below {shallowest:.1f} points, are not seen"
        )
    if not series.trained_groups():
        notes.append("no gradients were logged, so no gradient events, leads and alarms")
    elif (every := row_spacing(_gradient_steps(series))) > row_spacing(series.steps_T):
        notes.append(
            f"gradients were measured every {every} steps: events shorter than {every} steps "
            f"and those before step {events.HISTORY * every} cannot be seen, leads and alarms are "
            f"{every} steps coarse"
        )
    bad = int(np.sum(~np.isfinite(series.loss_T)))
    if bad and series.has_loss:
        notes.append(f"the loss of {count_noun(bad, 'step')} was not finite")
    return notes
