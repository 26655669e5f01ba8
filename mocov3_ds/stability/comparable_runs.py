"""Which runs may be compared while some still train? Those that ended, or all at the same step.

A run that has half its steps behind it is not worse than one that has ended. So unfinished runs are
left out where two seeds of each comparison have ended; otherwise all runs are cut at the last step
that all have reached, and judged again. Either way a sentence names them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mocov3_ds.stability.comparisons import has_no_network, list_pairs
from mocov3_ds.stability.knn_curve import final_accuracy
from mocov3_ds.stability.same_step import cut_series, has_ended, last_step, share_done
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.verdict import judge

STRAGGLER = 0.25
"""a run that has not even gone this share of the median run's way is left out"""
_ENOUGH_SEEDS = 2


@dataclass(frozen=True)
class LinedUp:
    """Runs that got equally far.

    Attributes:
        arms: label of an arm -> its comparable runs; arms without any are not there.
        notes: which runs are unfinished or counted otherwise, one sentence each.
    """

    arms: Arms
    notes: tuple[str, ...]


def line_up(arms: Arms) -> LinedUp:
    """The runs of a study that can be compared, and what is said of the others."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    notes = [
        f"{run.cell.name} stopped at a value that was not finite: in comparisons its final "
        f"accuracy counts as guessing ({run.series.knn_chance:.1f} %)."
        for run in runs
        if has_no_network(run)
    ]
    unfinished = [run for run in runs if not has_ended(run.series)]
    pairs = list_pairs(arms)
    if not unfinished:
        return LinedUp(arms, tuple(notes))
    names = ", ".join(map(_name_with_step, unfinished))
    if not pairs:
        return LinedUp(arms, (*notes, f"Unfinished: {names}."))
    ended = _keep(arms, [run for run in runs if has_ended(run.series)])
    if all(
        len(_shared_seeds(ended, pair)) >= min(_ENOUGH_SEEDS, len(_shared_seeds(arms, pair)))
        for pair in pairs
    ):
        notes.append(f"Unfinished, so left out of the arms' numbers and of comparisons: {names}.")
        return LinedUp(ended, tuple(notes))
    middle = median(share_done(run.series) for run in runs)
    stragglers = [run for run in unfinished if share_done(run.series) < STRAGGLER * middle]
    compared_runs = [run for run in runs if run not in stragglers]
    share = min((share_done(run.series) for run in compared_runs if run in unfinished), default=1.0)
    if stragglers:
        far = ", ".join(map(_name_with_step, stragglers))
        notes.append(f"Far behind, so left out of the arms' numbers and of comparisons: {far}.")
    going = ", ".join(_name_with_step(run) for run in unfinished if run not in stragglers)
    if going:
        notes.append(
            f"Unfinished: {going}. So the arms' numbers and the comparisons are those "
            f"{_where(compared_runs, share)}, the last that all of them have reached."
        )
    return LinedUp(_cut_arms(_keep(arms, compared_runs), share), tuple(notes))


def _keep(arms: Arms, runs: Sequence[JudgedRun]) -> Arms:
    """Some runs of the arms, those without any left out."""
    kept_runs = {label: [run for run in of_arm if run in runs] for label, of_arm in arms.items()}
    return {label: of_arm for label, of_arm in kept_runs.items() if of_arm}


def _shared_seeds(arms: Arms, pair: tuple[str, str]) -> set[int]:
    one, two = ({run.cell.seed for run in arms.get(label, ())} for label in pair)
    return one & two


def _name_with_step(run: JudgedRun) -> str:
    return f"{run.cell.name} (step {last_step(run.series)} of {run.series.total_steps})"


def _where(runs: Sequence[JudgedRun], share: float) -> str:
    lengths = {run.series.total_steps for run in runs}
    if len(lengths) == 1:
        return f"after step {round(share * lengths.pop())}"
    return f"after {100 * share:.0f} % of each run's steps"


def _cut_arms(arms: Arms, share: float) -> Arms:
    """All runs as they were after a share of their steps, judged again; twins are cut alike."""
    cut = {
        run.cell.name: cut_series(run.series, round(share * run.series.total_steps))
        for runs in arms.values()
        for run in runs
    }
    final = {name: final_accuracy(series.knn_K) for name, series in cut.items()}
    judged: dict[str, list[JudgedRun]] = {}
    for label, runs in arms.items():
        for run in runs:
            twin_knn = final.get(run.cell.twin, math.nan)
            series = dataclasses.replace(
                cut[run.cell.name], twin_knn=twin_knn if math.isfinite(twin_knn) else None
            )
            cut_run = dataclasses.replace(run, series=series, judgement=judge(series))
            judged.setdefault(label, []).append(cut_run)
    return judged
