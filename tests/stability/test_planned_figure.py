"""The picture of planned comparisons: every interval drawn, told ones filled."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mocov3_ds.stability import comparisons, planned, planned_figure
from mocov3_ds.stability.drawing import COLOURS, FAINT
from mocov3_ds.stability.planned import PlannedComparison
from tests.stability.judged_runs import judged_run


def test_a_panel_for_each_question_and_a_line_for_each_arm() -> None:
    knn = {"base": [30.0, 31, 32], "better": [33.1, 34, 35.2], "as good $x$": [30.3, 30.6, 32.1]}
    arms = {
        arm: [judged_run(arm, seed, value) for seed, value in enumerate(values)]
        for arm, values in knn.items()
    }
    questions = [
        PlannedComparison("Is one better?", "knn_final", "base", ("better", "as good $x$")),
        PlannedComparison("Alone?", "knn_final", "base", ("better",)),
        PlannedComparison("Nobody?", "knn_final", "base", ("gone",)),
    ]
    answers = comparisons.compare_planned(arms, questions)
    figure = planned_figure.draw_planned(answers)
    assert figure is not None
    first, second = figure.axes
    assert first.get_title(loc="left") == "Is one better?"
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["better", r"as good \$x\$"]
    lines = [line for line in first.lines[1:] if len(line.get_xdata()) == 2]
    points = [line for line in first.lines[1:] if len(line.get_xdata()) == 1]
    for line, point, one in zip(lines, points, answers[0][1], strict=True):
        assert tuple(line.get_xdata()) == one.interval
        assert point.get_xdata()[0] == one.difference
        colour = COLOURS[0] if one.is_told else FAINT
        assert line.get_color() == colour
        assert (to_hex(point.get_markerfacecolor()) == colour) == one.is_told
    assert [one.is_told for one in answers[0][1]] == [True, False]
    assert second.get_xlabel() == "points of k-NN accuracy above base"
    picture = planned_figure.PLANNED_PICTURE.make(answers)
    assert picture.data is not None and picture.data.startswith(b"\x89PNG")


def test_one_seed_or_no_arm_is_no_picture() -> None:
    arms = {arm: [judged_run(arm, 0, 30.0)] for arm in "ab"}
    one = PlannedComparison("Is b better?", "knn_final", "a", ("b",))
    answers = comparisons.compare_planned(arms, [one])
    assert np.isnan(answers[0][1][0].sd)
    assert planned_figure.draw_planned(answers) is None
    assert planned_figure.draw_planned([]) is None


@pytest.mark.parametrize("metric", planned.METRICS)
def test_each_metric_has_a_name_on_the_axis(metric: str) -> None:
    assert metric in planned_figure._AXIS


def test_settings_that_all_labels_of_a_question_share_are_left_out() -> None:
    labels = ["A, batch 8, lr 1", "B, batch 8, lr 2", "C, batch 8, lr 1"]
    assert planned_figure.short_names(labels) == ["A, lr\xa01", "B, lr\xa02", "C, lr\xa01"]
    assert planned_figure.short_names(["A, x", "A"]) == ["A, x", "A"]
    assert planned_figure.short_names(["only, batch 8"]) == ["only"]


def test_no_text_leaves_the_picture() -> None:
    names = [
        "Muon frozen 1024, batch 1024, lr 0.0025",
        "Muon 1024, batch 1024, lr 0.00025",
        "n" * 80,
    ]
    arms = {
        arm: [judged_run(arm, seed, 30.0 + seed + place * seed) for seed in range(3)]
        for place, arm in enumerate(names)
    }
    question = (
        "At batch 1024: does another optimizer end above the one that everybody takes, or not?"
    )
    asked = PlannedComparison(question, "knn_final", names[0], tuple(names[1:]))
    figure = planned_figure.draw_planned(comparisons.compare_planned(arms, [asked]))
    assert figure is not None
    figure.draw_without_rendering()  # lays it out
    (axes,) = figure.axes
    texts = [*axes.get_yticklabels(), axes.xaxis.label, axes._left_title]
    assert len(texts) == 4
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text.get_text()
