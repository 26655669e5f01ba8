"""The picture of what the instruments measured, arm by arm."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mocov3_ds.monitoring.signal_file import SignalFile, SignalTable, read_signals
from mocov3_ds.stability.curvature_figure import QUANTITIES, draw_curvature
from tests.stability.judged_runs import judged_run


def measured(folder: Path, names: tuple[str, ...]) -> SignalTable:
    """Signals of six steps, of which every second one has the instruments' values."""
    folder.mkdir()
    file = SignalFile(folder, ("head",), steps_done=0)
    for step in range(1, 7):
        values = dict.fromkeys(names, 10.0 * step) if step % 2 == 0 else {}
        file.write_row({"step": step, **values})
    file.close()
    return read_signals(folder)


def test_each_quantity_that_was_measured_has_a_panel_and_each_seed_a_line(tmp_path: Path) -> None:
    with_limit = measured(tmp_path / "a", ("sharpness", "sharpness_limit", "noise_scale"))
    without = measured(tmp_path / "b", ("sharpness",))
    arms = {
        "adamw": [replace(judged_run("adamw", seed, 30.0), signals=with_limit) for seed in (0, 1)],
        "muon": [replace(judged_run("muon", 0, 30.0), signals=without)],
        "none": [judged_run("none", 0, 30.0)],
    }
    figure = draw_curvature(arms)
    assert figure is not None
    sharpness, noise = figure.axes
    assert "sharpness" in sharpness.get_title(loc="left")
    assert "noise scale" in noise.get_title(loc="left")
    points = [line for line in sharpness.lines if line.get_linestyle() == "-"]
    assert [np.asarray(line.get_ydata()).tolist() for line in points] == [[20.0, 40.0, 60.0]] * 3
    assert sum(line.get_linestyle() == "--" for line in sharpness.lines) == 1
    assert len(noise.lines) == 2


def test_without_instruments_there_is_no_picture(tmp_path: Path) -> None:
    run = replace(judged_run("a", 0, 30.0), signals=measured(tmp_path / "c", ()))
    assert draw_curvature({"a": [run], "b": [judged_run("b", 0, 30.0)]}) is None
    assert {*QUANTITIES} == {"sharpness", "curvature", "noise_scale"}
