"""Do the arms of a study differ? Each comparison with its interval, corrected over the page.

Each arm is compared with the first one, and each frozen twin with its trained run, in the metrics
`PAGE_METRICS`, seed by seed. A difference is told where Holm's p over all of these is below 5 %.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import paired
from mocov3_ds.stability.planned import METRICS as NAMES
from mocov3_ds.stability.planned import PlannedComparison
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.study_tables import guessed_finals, tabulate_runs

Values = Mapping[str, Mapping[str, Mapping[int, float]]]
"""metric of `METRICS` -> label of an arm -> seed -> value; NaN where a run has none"""
METRICS: Mapping[str, tuple[str, str]] = {
    "knn_final": ("is {size} points above {reference}", "is {size} points below {reference}"),
    "knn_full": ("ends {size} points above {reference}", "ends {size} points below {reference}"),
    "jumps": (
        "has {size} more loss jumps a run than {reference}",
        "has {size} fewer loss jumps a run than {reference}",
    ),
    "worst_excess": (
        "has a worst loss excess {size} % larger than {reference}",
        "has a worst loss excess {size} % smaller than {reference}",
    ),
}
"""column of a run -> how a higher and a lower value are told"""
_SAME: Mapping[str, str] = {
    "knn_final": "final k-NN accuracy",
    "knn_full": "final accuracy",
    "jumps": "number of loss jumps a run",
    "worst_excess": "worst loss excess",
}
PAGE_METRICS = ("knn_final", "jumps", "worst_excess")
"""those of a page whose grid plans none; `knn_full` has one value a run, of the last step"""
COLUMNS = (
    *("arm", "reference", "metric", "seeds", "difference", "low", "high", "sd"),
    *("p", "p_holm", "p_sign_flip", "told", "smallest_shown"),
)
PLANNED_SEEDS = (3, 5, 8, 12)
PLANNED_NOTE = (
    "The grid's file planned the comparisons. Differences are paired by seed, intervals are "
    "Student's t of one comparison alone, and p is Holm's over the comparisons of a question."
)
NOTHING_PAIRED = (
    "No arms are compared: they are compared seed by seed, and no two have a run of one seed in "
    "common. A run that names no seed, in its settings or in its name (run-seed-1), has none."
)
_FEWEST_FLIPPED = 6
"""seeds from which on sign flips can pass 5 %"""


@dataclass(frozen=True)
class Comparison:
    """One metric of two arms, paired by seed.

    Attributes:
        arm: label of the arm.
        reference: label of the arm that it is compared with.
        metric: column of a run.
        seeds: seeds that both have with a finite value, ascending; not empty.
        differences: arm minus reference at each of them.
        difference: mean of arm minus reference, in the metric's unit.
        interval: its 95 % t interval, of this comparison alone; NaN with one seed.
        sd: standard deviation of the paired differences; NaN with one seed.
        p: two-sided p of this comparison alone; NaN with one seed.
        holm_p: p after Holm over all comparisons of the page; NaN with one seed.
        sign_flip_p: p without normality, of this comparison alone; NaN below 6 seeds.
        shown: smallest difference that so many seeds show in four of five studies, after the
            correction; infinite with one seed, NaN without a deviation.
        is_decided: whether all seeds of its question have ended; one that is not is never told.
    """

    arm: str
    reference: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    difference: float
    interval: tuple[float, float]
    sd: float
    p: float
    holm_p: float
    sign_flip_p: float
    shown: float
    is_decided: bool = True

    @property
    def is_told(self) -> bool:
        """Whether the seeds tell a difference."""
        return self.is_decided and self.holm_p < paired.ALPHA

    def describe_size(self) -> str:
        """A clause without its doubt: `is 2.7 points below frozen`."""
        size = f"{abs(self.difference):.1f}"
        if float(size) == 0:
            return f"has the same {_SAME[self.metric]} as {self.reference}, to a decimal"
        clause = METRICS[self.metric][self.difference < 0]
        return clause.format(size=size, reference=self.reference)

    def describe(self) -> str:
        """A clause: `is 2.7 points below frozen (95 % interval 0.2 to 5.1, 4 seeds, ...)`."""
        sign, text = -1 if self.difference < 0 else 1, self.describe_size()
        if len(self.seeds) < 2:
            return f"{text} (one seed: cannot be told)"
        # adding 0 makes a positive zero of what is rounded to a negative one
        low, high = (round(end, 1) + 0.0 for end in sorted(sign * end for end in self.interval))
        count = count_noun(len(self.seeds), "seed")
        doubt = "" if self.is_told else f": cannot be told at {count}"
        return (
            f"{text} (95 % interval {low:.1f} to {high:.1f}, {count}, "
            f"Holm p {_format_p(self.holm_p)}{doubt})"
        )


def _format_p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.01 else f"{p:.2f}"


def compare_values(values: Values, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Every metric of every pair of arms, corrected by Holm over all of them.

    Args:
        values: what was measured, of each metric, arm and seed.
        pairs: arm and reference; a pair without a seed in common is left out.
    """
    tests: list[tuple[str, str, str, dict[int, float], paired.PairedTest, float]] = []
    for metric, arms in values.items():
        step = paired.step_of(np.array([v for of_arm in arms.values() for v in of_arm.values()]))
        for arm, reference in pairs:
            a, b = arms.get(arm, {}), arms.get(reference, {})
            pairs_S = {s: a[s] - b[s] for s in sorted({*a} & {*b}) if math.isfinite(a[s] - b[s])}
            if pairs_S:
                differences_S = np.array([*pairs_S.values()])
                flips = math.nan
                if len(pairs_S) >= _FEWEST_FLIPPED:
                    flips = paired.sign_flip_p(differences_S)
                test = paired.compare_pairs(differences_S, step)
                tests.append((arm, reference, metric, pairs_S, test, flips))
    holm_C = paired.holm(np.array([float(test.p_X) for *_, test, _ in tests]))
    corrected = max(int(np.sum(~np.isnan(holm_C))), 1)
    return [
        Comparison(
            arm=arm,
            reference=reference,
            metric=metric,
            seeds=tuple(pairs_S),
            differences=tuple(pairs_S.values()),
            difference=float(test.mean_X),
            interval=(float(test.low_X), float(test.high_X)),
            sd=float(test.sd_X),
            p=float(test.p_X),
            holm_p=float(holm_p),
            sign_flip_p=flips,
            shown=paired.smallest_difference(float(test.sd_X), len(pairs_S), corrected),
        )
        for (arm, reference, metric, pairs_S, test, flips), holm_p in zip(
            tests, holm_C, strict=True
        )
    ]


def list_pairs(arms: Arms) -> list[tuple[str, str]]:
    """Each arm with the first one, and each frozen twin with its trained arm, once."""
    labels = [*arms]
    label_of = {run.cell.name: label for label, runs in arms.items() for run in runs}
    twins = [
        (label_of[run.cell.twin], label)
        for label, runs in arms.items()
        for run in runs
        if run.cell.twin in label_of
    ]
    pairs = [(label, labels[0]) for label in labels[1:]] + twins
    different = {frozenset(pair): pair for pair in reversed(pairs) if len({*pair}) == 2}
    return [pair for pair in pairs if different.pop(frozenset(pair), None)]


def measure_arms(arms: Arms) -> Values:
    """The metrics of all runs.

    The final accuracy of a run that stopped at a value that was not finite counts as guessing: the
    network classifies nothing any more, and leaving such a run out would favour its arm.
    """
    values: dict[str, dict[str, dict[int, float]]] = {metric: {} for metric in METRICS}
    runs = {run.cell.name: run for of_arm in arms.values() for run in of_arm}
    for row in tabulate_runs(arms):
        row |= guessed_finals(runs[row["run"]])
        for metric, of_arms in values.items():
            value = row[metric]
            of_arms.setdefault(row["arm"], {})[row["seed"]] = math.nan if value is None else value
    return values


def has_no_network(run: JudgedRun) -> bool:
    """Whether a run stopped at a value that was not finite, evaluated by then or not."""
    return run.has_no_network


def compare_arms(arms: Arms) -> list[Comparison]:
    """The comparisons of a page. Runs must have got equally far (`same_step.line_up`)."""
    values = measure_arms(arms)
    return compare_values({metric: values[metric] for metric in PAGE_METRICS}, list_pairs(arms))


def compare_planned(
    arms: Arms, planned: Sequence[PlannedComparison], seeds: int = 0
) -> list[tuple[PlannedComparison, list[Comparison]]]:
    """The comparisons of each question, corrected by Holm within it.

    Args:
        arms: runs that got equally far (`comparable_runs.line_up`).
        planned: questions; an arm without runs has no comparison.
        seeds: seeds that the grid plans; with fewer a question is not decided, and tells nothing.
    """
    values = measure_arms(arms)
    by_question = []
    for one in planned:
        pairs = [(arm, one.reference) for arm in one.arms]
        compared = compare_values({one.metric: values[one.metric]}, pairs)
        if count_ended(one, compared) < seeds:
            compared = [dataclasses.replace(pair, is_decided=False) for pair in compared]
        by_question.append((one, compared))
    return by_question


def count_ended(one: PlannedComparison, found: Sequence[Comparison]) -> int:
    """Seeds that have ended in all arms of a question."""
    fewest = min((len(pair.seeds) for pair in found), default=0)
    return fewest if len(found) == len(one.arms) else 0


@dataclass(frozen=True)
class Answer:
    """What a planned question's comparisons say, for people.

    Attributes:
        question: what it asks.
        basis: metric and number of comparisons; empty where it is not decided yet.
        summary: which arms are told from the reference.
        details: a sentence for each arm.
    """

    question: str
    basis: str
    summary: str
    details: tuple[str, ...]


def list_answers(
    answers: Sequence[tuple[PlannedComparison, Sequence[Comparison]]], seeds: int
) -> list[Answer]:
    """The answer to each question: what was found, what cannot be told.

    Args:
        answers: the questions with their comparisons (`compare_planned`).
        seeds: seeds that the grid plans; with fewer a question is not decided yet.
    """
    return [_answer(one, found, seeds) for one, found in answers]


def _answer(one: PlannedComparison, found: Sequence[Comparison], seeds: int) -> Answer:
    ended = count_ended(one, found)
    if not found or ended < seeds:
        waiting = (
            f"Not decided yet: {ended} of {count_noun(seeds, 'seed')} have ended in all of its "
            "arms."
        )
        return Answer(one.question, "", waiting, ())
    basis = f"{NAMES[one.metric]}; {count_noun(len(found), 'comparison')}, planned before the runs"
    told = [f"{other.arm} {other.describe_size()}" for other in found if other.is_told]
    rest = len(found) - len(told)
    untold = f"cannot be told from {one.reference} at {count_noun(seeds, 'seed')}."
    sentences = [f"Told: {'; '.join(told)}."] if told else []
    if rest:
        name = found[0].arm if len(found) == 1 else f"{rest} other" if told else f"All {rest}"
        sentences.append(f"{name} {untold}")
    details = tuple(f"{other.arm} {other.describe()}." for other in found)
    return Answer(one.question, basis, " ".join(sentences), details)


def list_findings(arms: Arms, comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each pair of arms; in a study of one arm one for each run instead.

    Where arms have no seed in common, a sentence says so.
    """
    if len(arms) < 2:
        return [f"{run.cell.name}: {run.judgement.why}" for runs in arms.values() for run in runs]
    if not comparisons:
        return [NOTHING_PAIRED]
    clauses: dict[tuple[str, str], list[str]] = {}
    for one in comparisons:
        clauses.setdefault((one.arm, one.reference), []).append(one.describe())
    return [f"{arm} {'; it '.join(texts)}." for (arm, _), texts in clauses.items()]


def describe_correction(comparisons: Sequence[Comparison]) -> list[str]:
    """What stands under the sentences: how they were corrected, and what more seeds would show."""
    tested = [one for one in comparisons if len(one.seeds) >= 2]
    if not tested:
        return []
    count = len(tested)
    sentences = [
        "Differences are paired by seed, intervals are Student's t of one comparison alone, and p "
        f"is Holm's over the {count_noun(count, 'comparison')} of this page: of 100 pages without "
        "any difference at most 5 claim one."
    ]
    knn = [one.sd for one in tested if one.metric == "knn_final"]
    if knn and median(knn) > 0:
        smallest, alone = (
            ", ".join(
                f"{paired.smallest_difference(median(knn), seeds, of):.1f}"
                for seeds in PLANNED_SEEDS
            )
            for of in (count, 1)
        )
        sentences.append(
            f"A paired difference of final k-NN accuracies varies by {median(knn):.1f} points from "
            f"seed to seed (standard deviation, median of {count_noun(len(knn), 'comparison')}). "
            f"With {', '.join(map(str, PLANNED_SEEDS))} seeds a page like this tells differences "
            f"of {smallest} points in four of five studies; a study that plans one comparison "
            f"alone, of {alone} points."
        )
    return sentences


def tabulate_comparisons(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One row a comparison with the columns of `comparisons.csv`; an empty one without any."""
    rows = [
        (
            *(one.arm, one.reference, one.metric, len(one.seeds), one.difference, *one.interval),
            *(one.sd, one.p, one.holm_p, one.sign_flip_p, one.is_told, one.shown),
        )
        for one in comparisons
    ]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows] or [dict.fromkeys(COLUMNS)]
