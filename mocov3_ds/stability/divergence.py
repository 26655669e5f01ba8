"""Did training break down for good? By values that are not finite, and by where the loss ends.

The loss is compared with its chance level, where that is known, and with itself. A healthy loss may
rise early: that of a queue does while the queue fills, and MoCo v3's rises from an early minimum by
a tenth or two. None ends above where it began after having been well below, none stays a fifth
above what it was before a sudden rise, and none loses again most of what it had gained.

Shape suffixes: T = rows, B = blocks of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.monitoring.medians import median_of, medians_of_windows
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import knn_curve
from mocov3_ds.stability.events import LOSS_WINDOW, Excursion
from mocov3_ds.stability.findings import Array, Flags, Series
from mocov3_ds.stability.trailing import MAD_TO_DEVIATION, longest_run

LOST = 0.5
"""DIVERGED: the accuracy ends below this share of its best"""
AT_CHANCE = 0.98
"""DIVERGED: the loss comes back above this share of its chance level"""
BROKEN_FOR = 0.01
"""for this share of the run, or is not finite in so many of its steps"""
AT_LEAST = 5
"""steps, in a run so short that the share is fewer: one skipped step is no divergence. So many that
are not finite in a row are one in a run of any length"""
LEFT_CHANCE = 0.95
"""share of the chance level below which a run counts as started"""
BEGINNING = 0.1
"""share of the rows in which a loss may rise: where it begins is its highest level there"""
CLEARLY = 0.1
"""share of its levels by which a loss must have been below where it began to have come back"""
ABOVE_START, BLOCK_NOISES = 0.02, 4.0
"""share of its levels, and standard deviations of one, by which it ends above where it began"""
RISEN = 0.2
"""share of its level by which a loss stays above that"""
GIVEN_UP = 0.5
"""share of what it had gained that a loss loses again"""
BLOCKS, FEWEST_IN_BLOCK, FEWEST_BLOCKS = 50, 5, 6
"""levels of a loss, each the median of so many rows at least, and how many there must be"""
NEAR_ZERO = 0.1
"""share of the extent of all levels that one nearer to 0 counts as, where shares of it are taken"""


def explain_divergence(series: Series) -> str:
    """Why the run counts as diverged; empty if it does not."""
    if series.has_loss and (sentence := _explain_diverged_loss(series)):
        return sentence
    if series.non_finite_end:
        return series.non_finite_end
    best, final = knn_curve.best_and_final_accuracy(series)
    if final < LOST * best:
        return f"the k-NN accuracy ended at {final:.1f} % after a best of {best:.1f} %"
    return ""


def explain_lasting_rise(series: Series, jumps: Sequence[Excursion]) -> str:
    """Why the loss counts as one that rose and did not come back; empty if it does not.

    Args:
        series: the run that is judged.
        jumps: events of its loss.
    """
    rows = np.flatnonzero(np.isfinite(series.loss_T))
    loss_T, steps_T = series.loss_T[rows], series.steps_T[rows]
    levels = _Levels.of(loss_T)
    if levels is None:
        return ""
    for jump in jumps:
        first = int(np.searchsorted(steps_T, jump.first))
        is_late = len(loss_T) - first < max(BROKEN_FOR * len(loss_T), AT_LEAST)
        if first < BEGINNING * len(loss_T) or is_late:
            continue
        # what was low for a moment alone is no level to come back to
        level_before = max(
            median_of(loss_T[max(first - reach, 0) : first])
            for reach in (LOSS_WINDOW, max(round(BEGINNING * len(loss_T)), 1))
        )
        lowest_after = float(np.min(_medians_of_blocks(loss_T[first:], levels.rows)))
        if lowest_after - level_before > RISEN * levels.size_of(level_before):
            return (
                f"the loss rose from {level_before:.3g} at step {jump.first} and never came back "
                f"below {lowest_after:.3g}"
            )
    gain, loss = levels.start - levels.best, levels.final - levels.best
    is_far = loss > RISEN * levels.size_of(levels.best)
    if is_far and gain > levels.margin and loss > GIVEN_UP * gain:
        return (
            f"the loss began at {levels.start:.3g}, fell to {levels.best:.3g} and ended at "
            f"{levels.final:.3g}"
        )
    return ""


def _explain_diverged_loss(series: Series) -> str:
    """Why the loss counts as diverged; empty if it does not."""
    loss_T = series.loss_T
    bad_T = ~np.isfinite(loss_T)
    if len(loss_T) and bad_T[-1]:
        first = len(bad_T) - int(np.argmin(bad_T[::-1])) if not bad_T.all() else 0
        return f"the loss was not finite from step {series.steps_T[first]} to the end"
    if series.stopped_non_finite:
        step = int(series.steps_T[-1]) if len(loss_T) else 0
        return f"a value was not finite after step {step}"
    if sentence := _explain_bad_rows(series, bad_T):
        return sentence
    started = np.flatnonzero(loss_T < LEFT_CHANCE * series.chance_loss)
    at_chance_T = loss_T > AT_CHANCE * series.chance_loss
    if len(started):
        longest = longest_run(at_chance_T[started[0] :])
        if longest >= max(BROKEN_FOR * series.total_steps, AT_LEAST):
            return f"the loss was back at its chance level for {longest} steps"
    elif len(loss_T) and series.steps_T[-1] >= 0.9 * series.total_steps and at_chance_T[-1]:
        return "the loss never left its chance level"
    return _explain_higher_end(loss_T[~bad_T])


def _explain_bad_rows(series: Series, bad_T: Flags) -> str:
    """Why losses that are not finite count as a divergence; empty if they do not."""
    bad, longest = int(np.sum(bad_T)), longest_run(bad_T)
    if bad < max(BROKEN_FOR * len(bad_T), AT_LEAST) and longest < AT_LEAST:
        return ""
    first = int(series.steps_T[np.argmax(bad_T)])
    in_a_row = f", {longest} in a row" if 1 < longest < bad else ""
    return f"the loss of {bad} steps was not finite from step {first} on{in_a_row}"


def _explain_higher_end(loss_T: Array) -> str:
    """Why finite losses count as diverged by where they end, (T,); empty if they do not."""
    levels = _Levels.of(loss_T)
    if levels is None or levels.final - levels.start <= levels.margin:
        return ""
    if levels.start - levels.best <= max(CLEARLY * levels.size_of(levels.start), levels.margin):
        return ""
    return (
        f"the loss ended at {levels.final:.3g}, above the {levels.start:.3g} that it began with, "
        f"after {levels.best:.3g}"
    )


def count_bad_losses(series: Series) -> int:
    """Steps whose loss was logged and is not finite."""
    return int(np.sum(~np.isfinite(series.loss_T))) if series.has_loss else 0


def describe_bad_losses(bad: int) -> str:
    """So many steps, in words."""
    return f"the loss of {count_noun(bad, 'step')} was not finite"


@dataclass(frozen=True)
class _Levels:
    """Where a loss was when, by medians of successive blocks of it.

    Attributes:
        start: highest level of its beginning.
        best: lowest level after that, of a tenth of the run.
        final: level of its last tenth.
        margin: how far two levels may differ by noise, or by little.
        extent: from the lowest to the highest level.
        rows: rows of a block.
    """

    start: float
    best: float
    final: float
    margin: float
    extent: float
    rows: int

    @classmethod
    def of(cls, loss_T: Array) -> "_Levels | None":
        """The levels of finite losses, (T,); None of too few."""
        rows = max(len(loss_T) // BLOCKS, FEWEST_IN_BLOCK)
        if len(loss_T) < FEWEST_BLOCKS * rows:
            return None
        level_B = _medians_of_blocks(loss_T, rows)
        begin = max(round(BEGINNING * len(level_B)), 1)
        extent = float(np.ptp(level_B))
        noise = MAD_TO_DEVIATION * median_of(np.abs(np.diff(level_B, 2))) / math.sqrt(6)
        size = max(abs(median_of(level_B)), NEAR_ZERO * extent)
        return cls(
            start=max(float(np.max(level_B[:begin])), median_of(loss_T[:FEWEST_IN_BLOCK])),
            best=float(np.min(_medians_along(level_B[begin:], begin))),
            final=median_of(level_B[-begin:]),
            margin=max(ABOVE_START * size, BLOCK_NOISES * noise),
            extent=extent,
            rows=rows,
        )

    def size_of(self, level: float) -> float:
        """What a share of a level is a share of."""
        return max(abs(level), NEAR_ZERO * self.extent)


def _medians_along(level_B: Array, width: int) -> Array:
    """Medians of all stretches of so many levels."""
    return medians_of_windows(np.lib.stride_tricks.sliding_window_view(level_B, width))


def _medians_of_blocks(loss_T: Array, rows: int) -> Array:
    """Medians of successive blocks of so many rows, or of all of fewer, (B,).

    What is left at the end, less than a block, is no part of them.
    """
    blocks = len(loss_T) // rows
    if blocks == 0:
        return np.array([median_of(loss_T)])
    return medians_of_windows(loss_T[: blocks * rows].reshape(blocks, rows))
