"""Which logs of other programs were cut short? The longest run of a page tells, where nothing does.

A log that ends says nothing of how long its run was to be. Runs of one page are compared, so a
shorter one counts as unfinished, unless the settings beside it tell its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.logs.lengths import has_come_to, total_of
from mocov3_ds.stability.same_step import last_step, share_done

ONE_LENGTH = 0.01
"""share of the longest run by which runs of one length may differ"""
_NAMED = 5


@dataclass(frozen=True, eq=False)
class RunLength:
    """A run with what is known of its length."""

    name: str
    series: Series
    unit: str = "step"
    """what its steps count: "step", "epoch" or "row" """
    is_planned: bool = True
    """whether it is known how long it was to be; else its end is that of its log"""


def settle_lengths(runs: Sequence[RunLength]) -> tuple[dict[str, Series], list[str]]:
    """The series of runs by name, those cut short as unfinished, and what is said of lengths.

    Args:
        runs: all runs of a page with logs of other programs.
    """
    settled = {run.name: run.series for run in runs}
    notes = []
    for unit in dict.fromkeys(run.unit for run in runs if not run.is_planned):
        alike = [run for run in runs if run.unit == unit]
        longest = max(alike, key=_length)
        short = [run for run in alike if not run.is_planned and _is_short(run, _length(longest))]
        for run in short:
            settled[run.name] = _as_unfinished(run.series, _length(longest))
        if short:
            notes.append(
                f"Nothing beside {'this log' if len(short) == 1 else 'these logs'} tells how long "
                f"the run was to be: {_list_lengths(short)}. So the longest run of the page, "
                f"{longest.name} ({_length(longest):,} {unit}s), tells, and what is shorter counts "
                "as unfinished. If it has ended, a config.json beside the log with its total_steps "
                "says so."
            )
    return settled, [*notes, *_describe_differences(runs, settled)]


def _length(run: RunLength) -> int:
    return max(run.series.total_steps, last_step(run.series))


def _is_short(run: RunLength, longest: int) -> bool:
    return last_step(run.series) < (1 - ONE_LENGTH) * longest and not has_come_to(
        run.series, longest
    )


def _as_unfinished(series: Series, longest: int) -> Series:
    """The series of a run that was to be as long; one whose loss ended in NaN has ended there."""
    total, _ = total_of(series, longest)
    is_lost = series.has_loss and len(series.loss_T) > 0 and not np.isfinite(series.loss_T[-1])
    return replace(series, total_steps=total, stopped_non_finite=is_lost and series.knn_chance > 0)


def _describe_differences(runs: Sequence[RunLength], settled: dict[str, Series]) -> list[str]:
    """Sentences about runs that have ended at other lengths, or that count something else."""
    notes = []
    units = dict.fromkeys(run.unit for run in runs)
    if len(units) > 1:
        named = "; ".join(
            f"{unit}s: {_list_names([run.name for run in runs if run.unit == unit])}"
            for unit in units
        )
        notes.append(
            f"The logs count different things ({named}), so their lengths are not compared, and "
            "runs that have ended are compared at their ends."
        )
    for unit in units:
        ended = [run for run in runs if run.unit == unit and share_done(settled[run.name]) >= 1]
        lengths = [last_step(run.series) for run in ended]
        if lengths and min(lengths) < (1 - ONE_LENGTH) * max(lengths):
            notes.append(
                f"Runs of different lengths that have ended are compared at their ends: "
                f"{_list_lengths(ended)}."
            )
    return notes


def _list_lengths(runs: Sequence[RunLength]) -> str:
    return _list_names([f"{run.name} ({last_step(run.series):,} {run.unit}s)" for run in runs])


def _list_names(names: Sequence[str]) -> str:
    beyond = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + beyond
