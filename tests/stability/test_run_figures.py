"""Pictures of one run: drawn where there is something, None where not."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mocov3_ds.stability import drawing, run_figures
from mocov3_ds.stability.run_curves import RunCurves, read_curves

NOTHING = RunCurves(steps_T=np.arange(3), values={}, alarms={}, signals=None)


@pytest.mark.parametrize(
    "draw",
    [
        run_figures.draw_loss,
        run_figures.draw_knn,
        run_figures.draw_rates,
        run_figures.draw_speed,
        run_figures.draw_memory,
        run_figures.draw_gradients,
        run_figures.draw_curvature,
        run_figures.draw_sequence,
        run_figures.draw_layers,
    ],
)
def test_nothing_logged_is_nothing_drawn(draw: object) -> None:
    assert callable(draw) and draw(NOTHING) is None


def test_curves_are_those_of_the_log(study_folder: Path) -> None:
    curves, _ = read_curves(study_folder / "cells/adamw_lr-0.001_seed-0")
    figure = run_figures.draw_loss(curves)
    assert figure is not None
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_ydata(), curves.values["loss"][1:])
    assert to_hex(line.get_color()) == drawing.COLOURS[0]
    knn = run_figures.draw_knn(curves)
    assert knn is not None
    labels = [text.get_text() for text in knn.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["base encoder", "fixed bank", "chance"]
    layers = run_figures.draw_layers(curves)
    assert layers is not None
    assert layers.axes[0].get_yticklabels()[0].get_text() == "patch embed"
    waiting = RunCurves(
        steps_T=np.arange(3),
        values={"save_s": np.zeros(3), "images_per_s": np.ones(3)},
        alarms={},
        signals=None,
    )
    speed = run_figures.draw_speed(waiting)
    assert speed is not None and len(speed.axes) == 1  # what was zero throughout has no panel


def test_instruments_clips_and_lengths_are_drawn_where_they_are_there() -> None:
    ones = np.ones(3)
    values = {
        "sharpness": np.array([np.nan, 5.0, 7.0]),
        "sharpness_limit": np.array([np.nan, 38e3, 19e3]),
        "noise_scale": 300 * ones,
        "clip_factor": 0.5 * ones,
        "query_patches": 32 * ones,
        "cpu_s": 2 * ones,
    }
    curves = RunCurves(steps_T=np.arange(3), values=values, alarms={}, signals=None)
    curvature = run_figures.draw_curvature(curves)
    assert curvature is not None
    sharpness, noise = curvature.axes
    value, limit = sharpness.lines
    assert list(np.asarray(value.get_ydata())) == [5.0, 7.0]
    assert list(np.asarray(limit.get_ydata())) == [38e3, 19e3]
    assert len(noise.lines) == 1
    for draw, word in (
        (run_figures.draw_gradients, "clip"),
        (run_figures.draw_sequence, "patches"),
        (run_figures.draw_speed, "CPU"),
    ):
        figure = draw(curves)
        assert figure is not None and word in figure.axes[0].get_title(loc="left")
