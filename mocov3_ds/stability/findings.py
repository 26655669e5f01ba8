"""What is known of a run's stability: the logged series, the events in it, and the judgement.

Shape suffixes: T = steps logged, K = k-NN evaluations, G = layer groups.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Steps = npt.NDArray[np.int64]
Verdict = Literal[
    "DIVERGED",
    "NOT LEARNING",
    "RESTARTED",
    "DEGRADING",
    "UNSTABLE",
    "BELOW ITS TWIN",
    "TWITCHY",
    "NOT LOOKED",
    "STABLE",
]
WORST_FIRST: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """What a run logged, as plain arrays.

    Attributes:
        steps_T: optimizer steps done, ascending, one per logged row.
        loss_T: loss; NaN or infinite where it was not finite.
        chance_loss: loss of a network that cannot tell its keys apart, 4 T ln N.
        lr_T: learning rate.
        groups: names of the G layer groups from input to output.
        grad_linf_GT: largest gradient of each group; NaN where not measured or frozen.
        rms_GT: RMS of g / sqrt(v_t) of each group; NaN where not measured, frozen, or LARS.
        knn_steps_K: steps of the k-NN evaluations, ascending.
        knn_K: k-NN accuracy in percent.
        probes: images that each evaluation classifies; 0 if unknown (no binomial error then).
        knn_chance: accuracy in percent of guessing.
        total_steps: planned length of the run.
        stopped_non_finite: whether the run ended because a value was not finite.
        epochs_per_step: epochs that a step goes on, for axes in epochs; NaN if unknown.
        twin_knn: final accuracy in percent of the twin with a frozen patch projection, if any.
        knn_at_start: accuracy in percent of the random network that the run began with, by the
            measure of `knn_at_end`; None if unknown, or where it began with trained weights.
        knn_at_end: accuracy in percent after the last step, by that measure; None if unknown.
        sibling: name of the best other arm at the same seed, if any.
        sibling_knn: its final accuracy in percent.
        siblings: number of arms that it is the best of.
        twin_bar: points by which the twin must end higher for the study's seeds to tell it
            (`other_arms`); NaN where one seed of each is all there is.
        sibling_bar: the same of the best other arm.
        begins_random: whether the first evaluation is of before training: of the random network, or
            of what a run went on from.
        has_loss: whether a loss was logged; where not, `loss_T` is NaN.
        non_finite_end: which logged gradient or accuracy was not finite from where to the end, a
            clause; empty where none was.
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
    epochs_per_step: float = math.nan
    twin_knn: float | None = None
    knn_at_start: float | None = None
    knn_at_end: float | None = None
    sibling: str = ""
    sibling_knn: float | None = None
    siblings: int = 0
    twin_bar: float = math.nan
    sibling_bar: float = math.nan
    begins_random: bool = False
    has_loss: bool = True
    non_finite_end: str = ""

    @property
    def random_knn(self) -> float | None:
        """Accuracy in percent before training, mostly the random network's; None if unknown."""
        if self.knn_at_start is None and self.begins_random and len(self.knn_K):
            return float(self.knn_K[0])
        return self.knn_at_start

    def trained_groups(self) -> list[str]:
        """Groups whose gradient was measured, from input to output; frozen ones have none."""
        rows = zip(self.groups, self.grad_linf_GT, strict=True)
        return [group for group, grad_T in rows if np.isfinite(grad_T).any()]

    def first_trained_layer(self) -> str | None:
        """The trained group nearest to the input, the class token not counted; None without one."""
        return next((group for group in self.trained_groups() if group != "cls"), None)

    def gradient_of(self, group: str) -> Array:
        """Largest gradient of a group, (T,)."""
        return self.grad_linf_GT[self.groups.index(group)]

    def rms_of(self, group: str) -> Array:
        """RMS of g / sqrt(v_t) of a group, (T,)."""
        return self.rms_GT[self.groups.index(group)]


@dataclass(frozen=True)
class GradientEvent:
    """A burst of one group's gradient.

    Attributes:
        group: name of the layer group.
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
    """A jump of the loss above its level.

    Attributes:
        first: its onset, the first step above the threshold.
        last: last step above it.
        peak: step of the largest excess.
        excess: how far the loss was above its level there, as a share of that level's absolute
            value: the trailing median, for an event of a verdict along the smooth trend.
    """

    first: int
    last: int
    peak: int
    excess: float


@dataclass(frozen=True)
class Dip:
    """A sudden or short fall of the k-NN curve.

    Attributes:
        first: step of the evaluation that opened it.
        last: step of the evaluation that closed it, or of the last one.
        lowest: step of the deepest evaluation.
        depth: points below the accuracy before.
        relative_depth: the same as a share of that accuracy.
        area: point-steps below it.
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
    """A slow and long fall of the k-NN curve, whatever else happens in it.

    Attributes:
        first: first step of the fall.
        last: last step of the fall.
        fall: points lost between them.
    """

    first: int
    last: int
    fall: float


@dataclass(frozen=True)
class Lead:
    """How far the first trained layer's gradient is ahead of the last block's, in steps.

    Positive: the shallow layer moves first.

    Attributes:
        first_group: the shallow group.
        last_group: the deep group.
        per_event: lead of each gradient event that both groups show.
        median: median of these; NaN without events.
        interval: 95 % interval of the median; NaN below 6 events, which cannot give one.
        shallow_first: whether the whole interval is above 0: only then may the order "first layer
            first" be claimed.
    """

    first_group: str
    last_group: str
    per_event: tuple[int, ...]
    median: float
    interval: tuple[float, float]
    shallow_first: bool


@dataclass(frozen=True)
class AlarmQuality:
    """How well an early alarm on one layer group predicted loss events within the next 8 steps.

    Attributes:
        alarms: episodes of the alarm.
        right: episodes that a loss event followed.
        caught: loss events that an episode came before.
        events: all loss events.
        base_rate: share of all steps that a loss event follows: precision of a random alarm.
        leads: steps from the alarm to the onset of each caught event.
        alarm: name of the rule in `monitoring.alarms.RULES`.
        group: layer group that the alarm watches.
    """

    alarms: int
    right: int
    caught: int
    events: int
    base_rate: float
    leads: tuple[int, ...]
    alarm: str
    group: str

    @property
    def precision(self) -> float:
        """Share of the alarms that were right; NaN without alarms."""
        return self.right / self.alarms if self.alarms else float("nan")

    @property
    def recall(self) -> float:
        """Share of the loss events that were predicted; NaN without events."""
        return self.caught / self.events if self.events else float("nan")


@dataclass(frozen=True)
class Judgement:
    """What `verdict.judge` concludes from a series.

    Attributes:
        verdict: the verdict, one word.
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
        final_loss: median loss of the last tenth of the rows.
        gradient_events: events of each group, by first step.
        loss_events: loss events, by first step.
        dips: dips, by first step.
        declines: declines, by first step.
        lead: first trained layer against the last block; None with fewer than two such groups.
        alarms: quality of each alarm rule on the first trained group.
        notes: what could not be judged, e.g. too short a history; one sentence each.
        not_looked: what was not looked for at all, and what it would take; one sentence each.
        knn_noise: standard deviation of one k-NN evaluation, from the curve itself, points.
        smallest_dip: depth in points of a dip of three evaluations that would just be told from
            noise; NaN where none is looked for.
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
    not_looked: tuple[str, ...] = ()
    knn_noise: float = float("nan")
    smallest_dip: float = float("nan")
