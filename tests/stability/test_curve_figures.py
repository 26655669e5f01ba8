"""Settings laid over one another: one colour an arm, epochs below, legends beside the curves."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability import curve_figures, drawing
from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.study import Arms, LoggedRun, judge_cells
from tests.stability import synthetic


def arms_of(*series: tuple[str, int, Series]) -> Arms:
    cells = [Cell(f"{label}-{seed}", label, {"seed": seed}, {}) for label, seed, _ in series]
    logged = {cell.name: LoggedRun(s) for cell, (_, _, s) in zip(cells, series, strict=True)}
    runs = judge_cells(cells, logged)
    return {
        label: [runs[cell.name] for cell in cells if cell.label == label]
        for label in dict.fromkeys(cell.label for cell in cells)
    }


@pytest.fixture(scope="module")
def arms() -> Arms:
    series = [synthetic.healthy(seed).series for seed in range(3)]
    series = [replace(one, epochs_per_step=0.01) for one in series]
    return arms_of(("cool $5$", 0, series[0]), ("cool $5$", 1, series[1]), ("hot", 0, series[2]))


def test_the_mean_lies_in_the_band_of_the_seeds_over_epochs(arms: Arms) -> None:
    figure = curve_figures.draw_knn_over_epochs(arms)
    assert figure is not None
    [axes] = figure.axes
    assert axes.get_xlabel() == "epochs"
    mean, _ = axes.lines
    first, second = (run.series for run in arms["cool $5$"])
    x, y = np.asarray(mean.get_xdata()), np.asarray(mean.get_ydata())
    curves = [np.interp(x, s.knn_steps_K * 0.01, s.knn_K) for s in (first, second)]
    np.testing.assert_allclose(y, np.mean(curves, axis=0))
    assert len({line.get_color() for line in axes.lines}) == 2
    assert len(axes.collections) == 1  # a band where there are two seeds
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [r"cool \$5\$", "hot"]
    drawing.as_png(figure)


def test_a_legend_stands_below_the_panel(arms: Arms) -> None:
    for draw in (curve_figures.draw_knn_over_epochs, curve_figures.draw_spikes_and_dips):
        figure = draw(arms)
        assert figure is not None
        drawing.as_png(figure)
        lowest = min(axes.get_window_extent().y0 for axes in figure.axes)
        assert figure.legends[0].get_window_extent().y1 <= lowest
        assert all(axes.get_legend() is None for axes in figure.axes)


def test_steps_where_epochs_are_not_known(arms: Arms) -> None:
    bare = replace(arms["hot"][0].series, epochs_per_step=float("nan"))
    figure = curve_figures.draw_loss_over_epochs(arms_of(("hot", 0, bare)))
    assert figure is not None and figure.axes[0].get_xlabel() == "step"


def test_spikes_and_dips_share_their_axis() -> None:
    restarted = synthetic.with_restart(0).series
    figure = curve_figures.draw_spikes_and_dips(arms_of(("hot", 0, restarted)))
    assert figure is not None
    gradient, accuracy = figure.axes
    assert gradient.get_xlim() == accuracy.get_xlim()
    assert np.asarray(accuracy.lines[0].get_ydata()).tolist() == restarted.knn_K.tolist()
    assert len(accuracy.patches) >= 1  # the dip


def test_lines_join_the_runs_of_one_seed(arms: Arms) -> None:
    figure = curve_figures.draw_paired_arms(arms)
    assert figure is not None
    [axes] = figure.axes
    joins = [line for line in axes.lines if line.get_color() == drawing.FAINT]
    assert len(joins) == 1  # seed 0 alone is in both arms
    assert list(joins[0].get_xdata()) == [
        arms["cool $5$"][0].judgement.final_knn,
        arms["hot"][0].judgement.final_knn,
    ]
    assert curve_figures.draw_paired_arms({"hot": arms["hot"]}) is None


def test_nothing_to_draw(arms: Arms) -> None:
    series = arms["hot"][0].series
    bare = replace(
        series,
        groups=(),
        grad_linf_GT=series.grad_linf_GT[:0],
        rms_GT=series.rms_GT[:0],
        knn_steps_K=series.knn_steps_K[:0],
        knn_K=series.knn_K[:0],
    )
    without = arms_of(("hot", 0, bare))
    assert curve_figures.draw_knn_over_epochs(without) is None
    assert curve_figures.draw_spikes_and_dips(without) is None
    assert curve_figures.draw_paired_arms(without) is None
