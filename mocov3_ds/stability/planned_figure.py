"""Planned comparisons as a picture: each difference with its interval, question by question."""

import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocov3_ds.stability import drawing
from mocov3_ds.stability.comparisons import Comparison
from mocov3_ds.stability.drawing import INK, plain_text
from mocov3_ds.stability.pictures import PictureKind
from mocov3_ds.stability.planned import PlannedComparison

Answers = Sequence[tuple[PlannedComparison, Sequence[Comparison]]]
_AXIS = {
    "knn_final": "points of k-NN accuracy",
    "knn_full": "points of k-NN accuracy",
    "jumps": "loss jumps a run",
    "worst_excess": "worst loss excess, %",
}
_LABEL = 24  # letters of a line of an arm's name
_NAME = 60  # letters of the whole name
_BELOW = 0.28  # of a row: the seeds lie so far below the interval
_NO_BREAK = "\N{NO-BREAK SPACE}"
_TITLE = 38  # letters of a line of a title, which begins where the axis does


def draw_planned(answers: Answers) -> Figure | None:
    """A panel for each question: differences from its reference with 95 % intervals.

    Filled points are told after the correction, hollow ones cannot be told.

    Args:
        answers: the questions with their comparisons (`comparisons.compare_planned`); those of one
            seed have no interval and are left out.
    """
    panels = [(one, [c for c in found if np.isfinite(c.sd)]) for one, found in answers]
    panels = [(one, found) for one, found in panels if found]
    if not panels:
        return None
    heights = [0.85 + 0.3 * len(found) for _, found in panels]
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure((drawing.WIDTH, sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (one, found) in zip(grid, panels, strict=True):
            _draw_question(axes, one, found)
    return figure


def _draw_question(axes: Axes, one: PlannedComparison, found: Sequence[Comparison]) -> None:
    axes.set_title(_in_lines(one.question, _TITLE), loc="left", fontsize=8.5)
    axes.axvline(0, color=INK, lw=0.8)
    for row, comparison in enumerate(found):
        colour = drawing.COLOURS[0] if comparison.is_told else drawing.FAINT
        seeds = [row + _BELOW] * len(comparison.differences)
        axes.plot(comparison.differences, seeds, "|", ms=5, color=colour, alpha=0.8)
        axes.plot(comparison.interval, [row, row], color=colour, lw=1.6)
        face = colour if comparison.is_told else "white"
        axes.plot(comparison.difference, row, "o", ms=5, color=colour, markerfacecolor=face)
    reference, *arms = short_names([one.reference, *(comparison.arm for comparison in found)])
    axes.set_yticks(range(len(found)), [_in_lines(arm[:_NAME], _LABEL) for arm in arms])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(_in_lines(f"{_AXIS[one.metric]} above {reference[:_NAME]}", _TITLE))


def short_names(labels: Sequence[str]) -> list[str]:
    """Labels without the settings that all of them share, as `batch 1024` in each of a panel.

    Args:
        labels: names of arms, each perhaps with settings behind commas. The name itself stays; a
            setting that stays has spaces at which no line ends.
    """
    parts = [label.split(", ") for label in labels]
    shared = set.intersection(*(set(settings[1:]) for settings in parts))
    own = [[s.replace(" ", _NO_BREAK) for s in part[1:] if s not in shared] for part in parts]
    return [", ".join([part[0], *settings]) for part, settings in zip(parts, own, strict=True)]


def _in_lines(text: str, letters: int) -> str:
    return "\n".join(plain_text(line) for line in textwrap.wrap(text, letters))


PLANNED_PICTURE: PictureKind[Answers] = PictureKind(
    "planned",
    "What was planned",
    "Mean paired difference from the reference and its 95 % interval, of this comparison alone. "
    "Filled: told after the correction; hollow: cannot be told at so many seeds. Ticks are seeds.",
    draw_planned,
)
