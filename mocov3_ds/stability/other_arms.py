"""What do the other arms of a study say of a run? Twin, best sibling, and what its seeds tell.

Runs of one setting end at different accuracies from seed to seed, so that one ends below another
says nothing of their settings by itself. Where a study has several seeds of two arms, it counts

* if the arms differ, seed by seed: a paired t test at 5 %, corrected over all pairs of arms and
  over the comparisons of a page, whichever are more, or
* if this run alone is further below than such differences deviate, at 1 % over all runs of the
  page. The deviation is pooled over the arms; where few seeds know it badly, that of miniature
  runs, `USUAL_DEVIATION`, or their own, if that is larger, stands in.

Arms are siblings where they make as many steps with as many images each and were evaluated alike.

Shape suffixes: A = arms, S = seeds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from scipy import special

from mocov3_ds.stability import paired
from mocov3_ds.stability.findings import Array, Series
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.knn_curve import final_accuracy
from mocov3_ds.stability.outliers import FALSE_ALARMS
from mocov3_ds.stability.references import one_sided_quantile
from mocov3_ds.stability.same_step import cut_series, has_ended, share_done

USUAL_DEVIATION = 2.15
"""standard deviation of a difference of two runs of one seed, points, where seeds do not tell it:
that of finals that deviate by 1.5, as the wilder miniatures' did"""
METRICS_OF_A_PAGE = 3
"""each pair of arms that a page compares is compared in so many metrics"""
_ALIKE = 0.01  # share by which lengths may differ, as of logs that end a few steps apart


class Logged(Protocol):
    """A run before it is judged."""

    @property
    def series(self) -> Series:
        """What it logged."""


def place_beside_others(cells: Sequence[Cell], logged: Mapping[str, Logged]) -> dict[str, Series]:
    """The series of each run with its twin's and its best sibling's accuracy, and what they tell.

    Args:
        cells: what is known of each run.
        logged: name of a cell -> its run; cells without one are left out.
    """
    placed: dict[str, Series] = {}
    for cell in cells:
        if cell.name not in logged:
            continue
        series = logged[cell.name].series
        if cell.twin in logged:
            twin_knn = _accuracy_beside(logged[cell.twin].series, series)
            series = dataclasses.replace(series, twin_knn=twin_knn)
        placed[cell.name] = _beside_siblings(series, cell, cells, logged)
    return _weigh_differences([cell for cell in cells if cell.name in placed], placed)


def _beside_siblings(
    series: Series, cell: Cell, cells: Sequence[Cell], logged: Mapping[str, Logged]
) -> Series:
    """The series with the best of its siblings at its seed that got as far, its twin apart."""
    accuracies = {}
    for sibling in cells:
        if sibling.seed != cell.seed or sibling.label == cell.label or sibling.name == cell.twin:
            continue
        if sibling.name in logged and are_alike(logged[sibling.name].series, series):
            accuracy = _accuracy_beside(logged[sibling.name].series, series)
            if accuracy is not None:
                accuracies[sibling.label] = accuracy
    if not accuracies:
        return series
    best = max(accuracies, key=lambda label: accuracies[label])
    return dataclasses.replace(
        series, sibling=best, sibling_knn=accuracies[best], siblings=len(accuracies)
    )


def are_alike(one: Series, other: Series) -> bool:
    """Whether two runs are as long, see as many images a step, and were evaluated alike."""
    if (one.probes, one.knn_chance) != (other.probes, other.knn_chance):
        return False
    longest = max(one.total_steps, other.total_steps)
    if abs(one.total_steps - other.total_steps) > _ALIKE * longest:
        return False
    epochs = one.epochs_per_step, other.epochs_per_step
    return any(map(math.isnan, epochs)) or math.isclose(*epochs, rel_tol=_ALIKE)


def _accuracy_beside(other: Series, series: Series) -> float | None:
    """Final accuracy of a twin or sibling, that at the same step where the run is unfinished.

    None where the other one is not there yet, or was not evaluated.
    """
    if not has_ended(series):
        if not has_ended(other) and share_done(other) < share_done(series):
            return None
        compared = cut_series(other, round(share_done(series) * other.total_steps))
    elif not has_ended(other):
        return None
    else:
        compared = other
    accuracy = final_accuracy(compared.knn_K)
    return accuracy if math.isfinite(accuracy) else None


def _weigh_differences(cells: Sequence[Cell], placed: Mapping[str, Series]) -> dict[str, Series]:
    """The series with `twin_bar` and `sibling_bar`, where the study's seeds tell them."""
    labels = [*dict.fromkeys(cell.label for cell in cells)]
    seeds = [*dict.fromkeys(cell.seed for cell in cells)]
    values_AS = np.full((len(labels), len(seeds)), math.nan)
    for cell in cells:
        series = placed[cell.name]
        if has_ended(series) and not (series.stopped_non_finite or series.non_finite_end):
            row, column = labels.index(cell.label), seeds.index(cell.seed)
            values_AS[row, column] = final_accuracy(series.knn_K)
    spread = measure_spread(values_AS)
    label_of = {cell.name: cell.label for cell in cells}
    twins = {frozenset((label_of[c.twin], c.label)) for c in cells if c.twin in label_of}
    page = METRICS_OF_A_PAGE * (len(labels) - 1 + len(twins))
    comparisons = max(len(labels) * (len(labels) - 1) // 2, page)
    weighed = {}
    for cell in cells:
        series, values_S = placed[cell.name], values_AS[labels.index(cell.label)]

        def bar(label: str, best_of: int, values_S: Array = values_S) -> float:
            pair_S = values_AS[labels.index(label)] - values_S
            pair_S = pair_S[np.isfinite(pair_S)]
            return bar_of_seeds(pair_S, spread, comparisons, len(cells) * max(best_of, 1))

        if series.twin_knn is not None and cell.twin in label_of:
            series = dataclasses.replace(series, twin_bar=bar(label_of[cell.twin], 1))
        if series.sibling in labels:
            bar_of_best = bar(series.sibling, series.siblings)
            series = dataclasses.replace(series, sibling_bar=bar_of_best)
        weighed[cell.name] = series
    return weighed


@dataclass(frozen=True)
class PairSpread:
    """How far differences of two arms at one seed deviate, pooled over the arms of a study.

    Attributes:
        deviation: standard deviation of such a difference, points; NaN without degrees.
        degrees: degrees of freedom that it has.
        resolution: smallest step of the values.
    """

    deviation: float
    degrees: int
    resolution: float


def measure_spread(values_AS: Array) -> PairSpread:
    """Deviation of paired differences, pooled over all pairs of arms.

    Args:
        values_AS: final accuracy of each arm and seed, percent; NaN where there is none.
    """
    resolution = paired.step_of(values_AS)
    squares, weights = 0.0, 0
    for one_S, other_S in combinations(values_AS, 2):
        pair_S = one_S - other_S
        pair_S = pair_S[np.isfinite(pair_S)]
        if len(pair_S) > 1:
            squares += float(np.var(pair_S, ddof=1)) * (len(pair_S) - 1)
            weights += len(pair_S) - 1
    if not weights:
        return PairSpread(math.nan, 0, resolution)
    # of arms and seeds that are compared at all: runs minus means of arms and of seeds
    there_AS = np.isfinite(values_AS)
    there_AS &= (there_AS.sum(0) > 1) & (there_AS.sum(1) > 1)[:, None]
    arms, seeds = int(there_AS.any(1).sum()), int(there_AS.any(0).sum())
    degrees = max(int(there_AS.sum()) - arms - seeds + 1, 1)
    deviation = max(math.sqrt(squares / weights), resolution / math.sqrt(6))
    return PairSpread(deviation, degrees, resolution)


def bar_of_seeds(pair_S: Array, spread: PairSpread, comparisons: int, alternatives: int) -> float:
    """Points by which the other run must end higher to count; NaN with fewer than two seeds.

    0 where the paired differences tell that the other arm is better.

    Args:
        pair_S: other arm minus this one at each seed that both have, points.
        spread: deviation of such differences over the study.
        comparisons: comparisons of arms that are corrected for.
        alternatives: runs of the page, times the arms of which the other one is the best.
    """
    if len(pair_S) < 2:
        return math.nan
    test = paired.compare_pairs(pair_S, spread.resolution)
    if float(test.mean_X) > 0 and float(test.p_X) * comparisons < paired.ALPHA:
        return 0.0
    deviation = max(spread.deviation, float(test.sd_X))
    share = FALSE_ALARMS / alternatives
    of_seeds = -float(special.stdtrit(spread.degrees, share)) * deviation
    return min(of_seeds, one_sided_quantile(share) * max(deviation, USUAL_DEVIATION))
