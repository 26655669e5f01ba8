"""Can a grid tell what it is for? Steps, evaluations and seeds of its cells beside what is needed.

Nothing is trained for it. How much a difference of two arms varies from seed to seed is known
beforehand of the k-NN accuracy alone, and roughly: as that of two accuracies of so many probes,
each with its binomial error, or by the `spread` of the grid's file where runs vary by more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.drawn_samples import SPLITS
from mocov3_ds.config.run_config import Config
from mocov3_ds.data import manifest, storage
from mocov3_ds.recipes import parse
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import paired
from mocov3_ds.stability.comparisons import PAGE_METRICS
from mocov3_ds.stability.drops import FEWEST
from mocov3_ds.stability.grid import Cell, Grid
from mocov3_ds.stability.verdict import FEWEST_STEPS

_DRAWN_TRAINING, _DRAWN_PROBES = SPLITS.values()


@dataclass(frozen=True)
class CellLength:
    """How long a cell is, and how often it is looked at.

    Attributes:
        steps: optimizer steps.
        evaluations: k-NN evaluations on the way.
        probes: images that each of them classifies.
    """

    steps: int
    evaluations: int
    probes: int


@dataclass(frozen=True)
class QuestionOutlook:
    """A question of a grid, and what its seeds can tell.

    Attributes:
        text: what is asked.
        metric: column of a run, or empty for all that a page compares.
        comparisons: comparisons that are corrected together.
        deviations: smallest difference that is told in four of five studies, in standard
            deviations of a paired difference; infinite with one seed.
        points: the same in points of k-NN accuracy; NaN of another metric, or where nothing is
            known of how runs vary.
        seeds_for_effect: seeds that tell the grid's effect; None where it names none, 0 where the
            seeds that it has do.
    """

    text: str
    metric: str
    comparisons: int
    deviations: float
    points: float
    seeds_for_effect: int | None

    def describe(self, seeds: int, effect: float) -> str:
        """A sentence."""
        if math.isinf(self.deviations):
            return f"{self.text} Cannot be told with one seed."
        clause = f"about {self.points:.1f} points"
        if math.isnan(self.points):
            clause = f"{self.deviations:.1f} standard deviations of a paired difference"
        tested = count_noun(self.comparisons, "comparison")
        sentence = (
            f"{self.text} With {count_noun(seeds, 'seed')} and {tested} {clause} are told in four "
            "of five studies"
        )
        if self.seeds_for_effect is None:
            return f"{sentence}."
        if not self.seeds_for_effect:
            return f"{sentence}; it wants {effect:g}."
        return f"{sentence}; it wants {effect:g}: CANNOT TELL, --seeds {self.seeds_for_effect}."


@dataclass(frozen=True)
class Outlook:
    """What is known of a grid before it runs.

    Attributes:
        cells: number of cells.
        arms: number of arms.
        seeds: runs of each arm.
        lengths: different lengths of its cells, shortest first; empty where the number of training
            images is not known.
        questions: what it asks.
        effect: difference that it asks for, in points of k-NN accuracy; 0 = it names none.
    """

    cells: int
    arms: int
    seeds: int
    lengths: tuple[CellLength, ...]
    questions: tuple[QuestionOutlook, ...]
    effect: float

    @property
    def can_tell(self) -> bool:
        """Whether seeds and lengths are enough for all that it asks, as far as can be known."""
        too_few = any(question.seeds_for_effect for question in self.questions)
        one_seed = any(math.isinf(question.deviations) for question in self.questions)
        return not (too_few or one_seed or self._shortfalls())

    def describe(self) -> list[str]:
        """Lines for a terminal."""
        lines = [
            f"{count_noun(self.cells, 'cell')}: {count_noun(self.arms, 'arm')}, "
            f"{count_noun(self.seeds, 'seed')}; {self._describe_lengths()}",
            f"detectors need {FEWEST} evaluations for falls and {FEWEST_STEPS} logged steps for "
            f"spikes: {' and '.join(self._shortfalls()) or 'every cell has them'}",
        ]
        lines += [question.describe(self.seeds, self.effect) for question in self.questions]
        return lines

    def _describe_lengths(self) -> str:
        if not self.lengths:
            return "steps and evaluations follow from the number of training images"
        steps = _span([length.steps for length in self.lengths])
        evaluations = _span([length.evaluations for length in self.lengths])
        return f"{steps} steps and {evaluations} k-NN evaluations in a cell"

    def _shortfalls(self) -> list[str]:
        """What some cell has too few of."""
        shortfalls = []
        evaluations = min((length.evaluations for length in self.lengths), default=FEWEST)
        steps = min((length.steps for length in self.lengths), default=FEWEST_STEPS)
        if evaluations < FEWEST:
            shortfalls.append(f"a cell has {count_noun(evaluations, 'evaluation')} only")
        if steps < FEWEST_STEPS:
            shortfalls.append(f"a cell has {count_noun(steps, 'step')} only")
        return shortfalls


def foresee(grid: Grid, extra: Sequence[str] = ()) -> Outlook:
    """What a grid can tell.

    Args:
        grid: the grid with its cells.
        extra: flags of train.py for every cell.
    """
    configs = _different_configs(grid, extra)
    lengths = {measure_length(config) for config in configs}
    counted = sorted((one for one in lengths if one is not None), key=lambda one: one.steps)
    sd = estimate_spread(min(count_probes(config) for config in configs), grid.spread)
    seeds = len({cell.seed for cell in grid.cells})
    families = [(one.question, one.metric, len(one.arms)) for one in grid.planned]
    if not families:
        text = "Does an arm differ from the first, or a frozen twin from its run?"
        families = [(text, "", len(PAGE_METRICS) * count_pairs(grid.cells))]
    return Outlook(
        cells=len(grid.cells),
        arms=len({cell.label for cell in grid.cells}),
        seeds=seeds,
        lengths=tuple(counted) if None not in lengths else (),
        questions=tuple(
            _foresee_question(*family, seeds=seeds, sd=sd, effect=grid.effect)
            for family in families
            if family[2]
        ),
        effect=grid.effect,
    )


def _foresee_question(
    text: str, metric: str, comparisons: int, *, seeds: int, sd: float, effect: float
) -> QuestionOutlook:
    deviations = paired.smallest_difference(1.0, seeds, comparisons)
    sd = sd if not metric or metric.startswith("knn") else math.nan
    needed: int | None = None
    if effect and not math.isnan(sd):
        try:
            needed = paired.count_seeds(effect, sd, comparisons)
        except ValueError:
            needed = paired.MOST_SEEDS  # as far as it looks
        needed = needed if needed > seeds else 0
    return QuestionOutlook(text, metric, comparisons, deviations, deviations * sd, needed)


def estimate_spread(probes: int, measured: float = 0.0) -> float:
    """Standard deviation of a paired difference of two accuracies, in points; NaN if unknown.

    Args:
        probes: images that each classifies, 0 = unknown; at 50 %, where the error is largest.
        measured: what runs have shown, in points; 0 = nothing.
    """
    binomial = 100 * math.sqrt(2 * 0.25 / probes) if probes else 0.0
    return max(binomial, measured) or math.nan


def count_pairs(cells: Sequence[Cell]) -> int:
    """Pairs of arms that a page compares: each with the first, and each twin with its run."""
    labels = [*dict.fromkeys(cell.label for cell in cells)]
    label_of = {cell.name: cell.label for cell in cells}
    pairs = {frozenset((label, labels[0])) for label in labels[1:]}
    pairs |= {frozenset((cell.label, label_of[cell.twin])) for cell in cells if cell.twin}
    return len(pairs)


def measure_length(config: Config) -> CellLength | None:
    """Length of a run with these settings; None where its images cannot be counted here."""
    images = count_images(config)
    if images is None:
        return None
    # as `training.build.count_steps`, which would load an engine
    steps = max(1, round(config.epochs * (images // config.batch)))
    probes, every = count_probes(config), config.knn.every_steps
    return CellLength(steps, steps // every if every and probes else 0, probes)


def count_probes(config: Config) -> int:
    """Images that an evaluation classifies, if there are so many; 0 = nothing is evaluated."""
    probes, data = config.knn.probes, config.data
    if data.shards or data.images:
        return probes if data.probe_shards else 0
    return min(probes, _DRAWN_PROBES)


def count_images(config: Config) -> int | None:
    """Training images of a run; None where they are elsewhere, or not sharded yet."""
    data = config.data
    if not (data.shards or data.images):
        if config.recipe != "tiny":
            return None
        return min(data.limit or _DRAWN_TRAINING, _DRAWN_TRAINING)
    if data.shards and storage.is_local(data.shards):
        try:
            images = manifest.load(data.shards).samples
        except (ValueError, OSError):  # the cells will say what is wrong with them
            return None
        return min(data.limit or images, images)
    return data.limit or None


def _different_configs(grid: Grid, extra: Sequence[str]) -> list[Config]:
    """Settings of the cells, one of each length."""
    cells: dict[tuple[str, ...], Cell] = {}
    for cell in grid.cells:
        lengths = (cell.settings.get(key) for key in _LENGTHS)
        cells.setdefault(tuple(map(str, lengths)), cell)
    return [parse([*cell.flags(), *extra]).config for cell in cells.values()]


_LENGTHS = ("recipe", "batch", "epochs", "data.limit", "knn.every_steps", "knn.probes")
"""settings of a cell by which its length may differ from that of another"""


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
