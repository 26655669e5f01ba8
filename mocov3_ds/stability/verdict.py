"""One word on a run's stability, and the numbers behind it: pure functions of logged series.

    judgement = judge(series)
    judgement.verdict      one word, the first that applies, from the worst

    DIVERGED        a value was not finite at the end, in five steps in a row or in 1 % of them, the
                    loss sits at its chance level or ends above where it began after having been
                    well below, or the k-NN accuracy ends below half of its best
    NOT LEARNING    it ends no better than before training, or than guessing, without a fall
    RESTARTED       a sudden dip of more than a fifth of the accuracy that is not made good for
                    2 % of the run: the partial restart of arXiv 2104.02057, Sec. 4.1
    DEGRADING       accuracy falls slowly for 5 % of the run or more: LAMB's failure (Fig. 3)
    UNSTABLE        another dip; losses 7 deviations out, or not finite, in more than 0.1 % of the
                    steps (and in two); one event of the loss of 0.5 % of the steps (20 at least;
                    100 where that is fewer); or a loss that rose by a fifth for good, at once or
                    by half of what it had gained
    BELOW ITS TWIN  no event, but the frozen twin, or another arm at the same seed, ends higher by
                    more than the noise of such a difference
    TWITCHY         gradient or loss events without a dip, or a loss that was not finite
    NOT LOOKED      nothing was found, and too little is logged to look for dips, or for events of
                    the loss
    STABLE          all were looked for, and none was found; where no gradients are logged it says
                    so

What is a dip, a decline or an event follows from the noise of the series itself, such that one
quiet run in a hundred has one, whatever its length (`drops`, `outliers`). No event of the loss or
of gradients is looked for in the first 16 logged steps.

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
from mocov3_ds.stability import events, knn_curve, outliers
from mocov3_ds.stability.alarm_quality import judge_alarms
from mocov3_ds.stability.divergence import (
    count_bad_losses,
    describe_bad_losses,
    explain_divergence,
    explain_lasting_rise,
)
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
from mocov3_ds.stability.repeated_rows import drop_bad_accuracies, keep_last_rows
from mocov3_ds.stability.trailing import is_measured, row_spacing, window_length

SPIKE_SHARE = 0.001
"""UNSTABLE: share of steps whose loss is 7 deviations out or not finite (and at least two steps)"""
LONG_SPIKE, LONG_ROWS = 0.005, 20
"""UNSTABLE: share of the rows that one event of the loss lasts, and how many these are at least"""
FEWEST_STEPS = 2 * events.HISTORY
"""logged steps below which no gradient or loss event can be told from noise"""
_FEW_EVALUATIONS = 50
_SHORT_BEGINNING = 0.01  # share of the rows below which those that are no past yet are not named


def judge(series: Series) -> Judgement:
    """Apply every detector and name the verdict.

    Of a step that was logged more than once the last row counts.

    Raises:
        ValueError: arrays have different lengths.
    """
    _check_arrays(series)
    series, repeated = keep_last_rows(series)
    series, bad_accuracies = drop_bad_accuracies(series)
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
    unknown_learning = explain_unknown_learning(series, curve.noise, final)
    not_looked = [*_list_not_looked(series), *([unknown_learning] if unknown_learning else [])]
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
            *_list_notes(series, shallowest, (repeated, bad_accuracies)),
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
    if divergence := explain_divergence(series):
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
    if unstable := _explain_unstable_loss(series, jumps, spikes):
        return "UNSTABLE", unstable
    if behind := explain_behind(series, curve.noise, final):
        return "BELOW ITS TWIN", behind
    bad = count_bad_losses(series)
    if bursts or jumps or bad:
        fell = (
            "no dip of the k-NN accuracy"
            if len(series.knn_K) >= FEWEST
            else "dips of the k-NN accuracy were not looked for"
        )
        of_gradients = f"{count_noun(len(bursts), 'gradient event')} and "
        return "TWITCHY", (
            f"{describe_bad_losses(bad) + '; ' if bad else ''}"
            f"{of_gradients if series.trained_groups() else ''}"
            f"{count_noun(len(jumps), 'loss event')}, {fell}"
        )
    return None


def _explain_unstable_loss(series: Series, jumps: Sequence[events.Excursion], spikes: int) -> str:
    """Why the loss alone makes the run unstable; empty if it does not."""
    if rise := explain_lasting_rise(series, jumps):
        return rise
    rows, bad = max(len(series.steps_T), 1), count_bad_losses(series)
    if bad >= 2 and bad > SPIKE_SHARE * rows:
        return f"{describe_bad_losses(bad)} ({100 * bad / rows:.2f} %)"
    if len(jumps) >= 2 and spikes >= 2 and spikes > SPIKE_SHARE * rows:
        return (
            f"the loss of {spikes} steps ({100 * spikes / rows:.2f} %) is 7 deviations above its "
            "rolling mean"
        )
    # after so many rows a new level is the usual one, and the event ends
    fewest_rows = min(max(LONG_SPIKE * rows, LONG_ROWS), outliers.LONGEST_BURST)
    longest = max(jumps, key=lambda jump: jump.rows, default=None)
    if longest is not None and longest.rows >= fewest_rows:
        return (
            f"one event of the loss lasts {longest.rows} logged steps, from step {longest.first} "
            f"to {longest.last}"
        )
    return ""


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
    losses = int(np.sum(np.isfinite(series.loss_T)))
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
    elif losses < FEWEST_STEPS:
        missing.append(
            f"no loss event was looked for: the loss of {count_noun(losses, 'logged step')} is "
            f"finite, {FEWEST_STEPS} are needed"
        )
    return missing


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


def _list_notes(series: Series, shallowest: float, left_out: tuple[int, int]) -> list[str]:
    """What could not be judged, or only in part, one sentence each.

    `left_out` are rows of steps that were logged again, and evaluations that were not finite.
    """
    repeated, bad_accuracies = left_out
    notes = _list_not_looked(series)
    last = int(series.steps_T[-1]) if len(series.steps_T) else 0
    if last < series.total_steps:
        notes.append(f"judged after {last} of {series.total_steps} steps")
    if repeated:
        notes.append(f"{count_noun(repeated, 'row')} of steps logged again later did not count")
    if bad_accuracies:
        evaluations = count_noun(bad_accuracies, "k-NN evaluation")
        notes.append(f"{evaluations} that {_was(bad_accuracies)} not finite did not count")
    if series.has_loss and FEWEST_STEPS <= len(series.steps_T) < events.HISTORY / _SHORT_BEGINNING:
        step = int(series.steps_T[events.HISTORY])
        of_gradients = "gradient and " if series.trained_groups() else ""
        notes.append(f"{of_gradients}loss events are looked for from step {step} on")
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
    if bad := count_bad_losses(series):
        notes.append(describe_bad_losses(bad))
    return notes


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
