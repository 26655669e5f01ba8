"""The signal file: written, cut, read; and a group's extremes over its tensors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.signal_file import (
    SCALARS,
    SIGNALS,
    GroupExtremes,
    SignalFile,
    column_names,
    read_signals,
)

GROUPS = ("patch_embed", "block_0", "predictor")


def write(run: Path, first: int, last: int, done: int) -> None:
    file = SignalFile(run, GROUPS, steps_done=done)
    for step in range(first, last + 1):
        values = {"step": step, "loss": 5.0 - step / 10, "block_0/rms": step * 0.5}
        if step % 3 == 0:
            values["knn"] = 10.0 + step
        file.write_row(values)
    file.close()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1, 7, done=0)
    table = read_signals(tmp_path)
    assert table.groups == GROUPS and table.signals == tuple(SIGNALS)
    assert table.steps.tolist() == [1, 2, 3, 4, 5, 6, 7] and table.steps.dtype == np.int64
    assert table.column("block_0", "rms").tolist() == [0.5 * step for step in range(1, 8)]
    assert np.isnan(table.column("patch_embed", "rms")).all()
    steps_K, knn_K = table.measured("knn")
    assert (steps_K.tolist(), knn_K.tolist()) == ([3, 6], [13.0, 16.0])
    assert table.grid("rms").shape == (3, 7)
    assert (tmp_path / "signals.f32").stat().st_size == 7 * 4 * len(column_names(GROUPS))


def test_several_signals_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 7, done=0)
    table = read_signals(tmp_path)
    monkeypatch.setattr(signal_file, "_ROWS_AT_ONCE", 3)
    rms, trust = table.grids("rms", "trust")
    np.testing.assert_array_equal(rms, table.grid("rms").astype(float), strict=True)
    np.testing.assert_array_equal(trust, table.grid("trust").astype(float), strict=True)
    assert rms[1].tolist() == [0.5 * step for step in range(1, 8)]


def test_a_resumed_file_reads_like_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run in (whole, broken):
        run.mkdir()
    write(whole, 1, 9, done=0)
    write(broken, 1, 6, done=0)
    with (broken / "signals.f32").open("ab") as file:
        file.write(b"cut short")
    assert len(read_signals(broken).steps) == 6
    write(broken, 5, 9, done=4)
    assert (whole / "signals.f32").read_bytes() == (broken / "signals.f32").read_bytes()
    write(broken, 1, 2, done=0)  # afresh
    assert read_signals(broken).steps.tolist() == [1, 2]


def test_a_file_with_other_columns_keeps_what_both_know(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, done=0)
    header = json.loads((tmp_path / "signals.json").read_text())
    header["columns"][header["columns"].index("loss")] = "former"
    (tmp_path / "signals.json").write_text(json.dumps(header))
    write(tmp_path, 4, 4, done=3)
    table = read_signals(tmp_path)
    assert table.steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(table.scalar("loss")).tolist() == [True, True, True, False]
    assert table.column("block_0", "rms").tolist() == [0.5, 1.0, 1.5, 2.0]


def test_no_file_and_no_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no signals.json: it was trained with"):
        read_signals(tmp_path)
    write(tmp_path, 1, 1, done=0)
    with pytest.raises(ValueError, match=r"no column 'block_0/speed'; it has step, lr, "):
        read_signals(tmp_path).column("block_0", "speed")
    header = json.loads((tmp_path / "signals.json").read_text())
    (tmp_path / "signals.json").write_text(json.dumps(header | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        read_signals(tmp_path)


def test_columns_are_scalars_then_groups_from_input_to_output() -> None:
    names = column_names(GROUPS)
    assert names[: len(SCALARS)] == tuple(SCALARS) and names[0] == "step"
    assert names[len(SCALARS)] == "patch_embed/grad_linf" and names[-1] == "predictor/fc2_rms"


def test_a_group_shows_the_extremes_of_its_tensors() -> None:
    extremes = GroupExtremes(GROUPS, ["block_0", "predictor", "block_0", "block_0"])
    table = {
        "grad_peak": [1.0, 9.0, 4.0, 2.0],
        "grad_norm": [3.0, 9.0, 1.0, 2.0],
        "weight_norm": [1.0, 9.0, 2.0, 3.0],
        "update_norm": [2.0, 9.0, 1.0, 1.0],
        "rate": [0.1, 0.1, 0.5, 0.1],
        "trust_ratio": [1.0, 2.0, 0.25, 4.0],
        "adapts": [0.0, 1.0, 1.0, 1.0],
        "rms": [0.1, 9.0, 0.3, 0.2],
        "rms_before": [np.nan, np.nan, np.nan, np.nan],
        "cosine": [np.nan, 0.5, -0.2, 0.1],
    }
    row = extremes.reduce_tensors({k: np.array(v, np.float32) for k, v in table.items()})
    block = {
        key.removeprefix("block_0/"): v for key, v in row.items() if key.startswith("block_0/")
    }
    assert block.pop("rms_before") != block.get("rms_before")  # NaN
    assert block == pytest.approx(
        {
            "grad_linf": 4.0,
            "grad_l2": 3.0,
            "weight_l2": 3.0,
            "update_l2": 0.4,
            "trust": 4.0,
            "trust_min": 0.25,
            "rms": 0.3,
            "cosine": -0.2,
            "update_ratio": math.sqrt((0.2**2 + 0.125**2 + 0.4**2) / (1 + 4 + 9)),
        }
    )
    assert math.isnan(row["patch_embed/grad_linf"])  # frozen
    table["grad_peak"][2] = np.nan
    row = extremes.reduce_tensors({k: np.array(v, np.float32) for k, v in table.items()})
    assert math.isnan(row["block_0/grad_linf"])
