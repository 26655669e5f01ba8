"""Pictures show what the runs have: one panel an arm, and none where there is nothing to draw."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.stability import figures
from mocov3_ds.stability.findings import GradientEvent
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.layer_order import summarise_leads
from mocov3_ds.stability.study import Arms, JudgedRun, read_study
from mocov3_ds.stability.verdict import judge
from tests.stability import synthetic
from tests.stability.judged_runs import judged_run


@pytest.fixture(scope="module")
def arms(study_folder: Path) -> Arms:
    return read_study(study_folder).arms


def titles(figure: figures.Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_titles_count_what_is_drawn(arms: Arms) -> None:
    knn, losses = figures.draw_knn(arms), figures.draw_losses(arms)
    assert knn is not None and losses is not None
    assert "AdamW, lr 0.001: 1, 1 dips in 2 seeds" in titles(knn)
    assert "AdamW, lr 0.001: 2, 2 jumps in 2 seeds" in titles(losses)
    assert "LAMB: no dip" in titles(knn)


def test_without_a_loss_there_is_no_picture_of_it(arms: Arms) -> None:
    silent = {
        label: [replace(run, series=replace(run.series, has_loss=False)) for run in runs]
        for label, runs in arms.items()
    }
    assert figures.draw_losses(silent) is None


def test_events_are_aligned_at_their_start(arms: Arms) -> None:
    figure = figures.draw_events(arms)
    assert figure is not None
    assert len(figure.axes) == 2  # the two trained AdamW arms
    for axes in figure.axes:
        median = axes.lines[0]
        steps = np.asarray(median.get_xdata())
        values = np.asarray(median.get_ydata())
        assert (steps[0], steps[-1]) == (-40, 20)
        assert values[steps < -10].max() < 2 < values[(steps >= 0) & (steps < 5)].max()


def test_the_span_around_events_holds_the_lead() -> None:
    def with_lead(*leads: int) -> JudgedRun:
        run = judged_run("a", 0, 40.0)
        lead = summarise_leads("patch_embed", "block_2", leads)
        event = GradientEvent("patch_embed", 120, 121, 120, 9.0)
        judgement = replace(run.judgement, lead=lead, gradient_events=(event,))
        return replace(run, judgement=judgement)

    for leads, ends in (((5,), (-40, 20)), ((77, 3), (-40, 87)), ((-60,), (-70, 20))):
        figure = figures.draw_events({"a": [with_lead(*leads)]})
        assert figure is not None
        steps = np.asarray(figure.axes[0].lines[0].get_xdata())
        assert (steps[0], steps[-1]) == ends


def test_ticks_are_the_starts_of_alarms(arms: Arms) -> None:
    figure = figures.draw_rms(arms)
    assert figure is not None
    by_title = dict(zip(titles(figure), figure.axes, strict=True))
    [axes] = [a for title, a in by_title.items() if title.startswith("AdamW, lr 0.001: patch")]
    ticks = np.asarray(axes.lines[-1].get_xdata())
    assert len(ticks) == 2 and all(abs(ticks - [200, 330]) < 20)
    assert any(title.startswith("AdamW, lr 0.001, frozen: block_0") for title in by_title)


def test_pictures_without_anything_to_draw() -> None:
    series = synthetic.healthy(0).series
    no_values = np.empty((0, len(series.steps_T)))
    bare = replace(
        series,
        groups=(),
        grad_linf_GT=no_values,
        rms_GT=no_values,
        knn_steps_K=series.knn_steps_K[:0],
        knn_K=series.knn_K[:0],
    )
    arms = {"a": [JudgedRun(Cell("", "a", {"seed": 0}, {}), bare, judge(bare), None)]}
    for draw in (
        figures.draw_knn,
        figures.draw_heat_map,
        figures.draw_events,
        figures.draw_rms,
        figures.draw_rates,
        figures.draw_trust_ratios,
    ):
        assert draw(arms) is None
    assert figures.draw_losses(arms) is not None


def test_a_heat_map_loses_no_spike() -> None:
    heat_GT = np.zeros((2, 5000))
    heat_GT[1, 3217] = 1.5
    reduced_GT = figures._reduce_columns(heat_GT)
    assert reduced_GT.shape == (2, 620)
    assert reduced_GT[1].max() == 1.5 and reduced_GT[0].max() == 0


def test_forks_beside_their_control() -> None:
    control, calm = (synthetic.healthy(seed).series for seed in (0, 1))
    figure = figures.draw_forks({"nothing": control, "norm": calm, "cls": calm}, 500, 560, 520)
    assert titles(figure) == ["norm", "cls"]
    for axes in figure.axes:
        assert axes.get_xlim() == (480, 560)
        assert (np.asarray(axes.lines[0].get_ydata()) == control.loss_T).all()
