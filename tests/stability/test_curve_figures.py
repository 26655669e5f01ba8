"""Settings laid over one another: one colour an arm, epochs below, legends beside the curves."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability import curve_figures, drawing
from mocov3_ds.stability.arm_questions import look_for_dips
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
    first_seed, second_seed, mean, alone = axes.lines
    first, second = (run.series for run in arms["cool $5$"])
    x, y = np.asarray(mean.get_xdata()), np.asarray(mean.get_ydata())
    curves = [np.interp(x, s.knn_steps_K * 0.01, s.knn_K) for s in (first, second)]
    np.testing.assert_allclose(y, np.mean(curves, axis=0))
    for line, curve in zip((first_seed, second_seed), curves, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), curve)
    assert mean.get_color() == first_seed.get_color() != alone.get_color()
    [band] = axes.collections  # where there are two seeds
    corners = band.get_paths()[0].vertices
    place = len(x) // 2
    ends = sorted({corner[1] for corner in corners if np.isclose(corner[0], x[place])})
    reach = 12.7062 * abs(curves[0][place] - curves[1][place]) / 2  # Student's t, 1 degree, n = 2
    np.testing.assert_allclose(ends, [y[place] - reach, y[place] + reach], rtol=1e-4)
    assert axes.get_ylim()[1] < 60  # the interval of two seeds does not squeeze the curves
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


def test_the_mean_after_spikes_stands_in_the_band_of_shifted_ones() -> None:
    dipping = arms_of(
        *(("hot", seed, synthetic.with_dips(seed, count=3).series) for seed in (0, 1))
    )
    figure = curve_figures.draw_average_after_spikes(dipping)
    assert figure is not None
    [axes] = figure.axes
    mean, [band] = axes.lines[0], axes.collections
    found = look_for_dips(dipping)
    np.testing.assert_array_equal(np.asarray(mean.get_ydata()), found.average_W)
    lowest = np.asarray(band.get_paths()[0].vertices)[:, 1].min()
    assert lowest == found.low_W.min()
    assert found.average_W.min() < lowest  # the planted dips follow their spikes
    drawing.as_png(figure)
    assert curve_figures.draw_average_after_spikes(arms_of(("cool", 0, calm()))) is None


def calm() -> Series:
    """A run without gradients."""
    series = synthetic.healthy(0).series
    return replace(series, groups=(), grad_linf_GT=np.empty((0, 2000)), rms_GT=np.empty((0, 2000)))
