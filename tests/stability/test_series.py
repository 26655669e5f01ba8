"""A run folder as arrays: columns, signals by step, and whether a bad step ended it."""

import json
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.stability.series import read_series
from tests.stability.written_study import EVERY, STEPS, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", ["--recipe", "tiny", "--epochs", "60"], 0, spikes=[], trained=False)
    return tmp_path / "run"


def test_columns_and_signals(run: Path) -> None:
    series = read_series(run, twin_knn=40.0)
    assert (series.steps_T == np.arange(1, STEPS + 1)).all()
    assert (series.knn_steps_K == np.arange(EVERY, STEPS + 1, EVERY)).all()
    assert (series.chance_loss, series.knn_chance, series.twin_knn) == (4.4, 10.0, 40.0)
    assert series.total_steps == 60 * 16
    assert "patch_embed" not in series.trained_groups()
    assert series.first_trained_layer() == "block_0"
    assert np.isfinite(series.rms_of("block_0")).all()
    assert not series.stopped_non_finite


def test_rows_without_signals_or_values(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3]["loss"] = None
    rows.append({**rows[-1], "step": STEPS + 1})  # logged, its signals not yet written
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series(run)
    assert np.isnan(series.loss_T[2])
    assert np.isnan(series.gradient_of("block_0")[-1])
    for name in ("signals.json", "signals.f32"):
        (run / name).unlink()
    bare = read_series(run)
    assert bare.groups == () and bare.grad_linf_GT.shape == (0, STEPS + 1)


def test_a_bad_step_after_the_last_row_ended_the_run(run: Path) -> None:
    (run / "trouble").mkdir()
    (run / "trouble/step-7.json").write_text("{}")
    assert not read_series(run).stopped_non_finite
    (run / f"trouble/step-{STEPS + 1}.json").write_text("{}")
    assert read_series(run).stopped_non_finite


def test_a_run_without_a_step(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 0, "knn_full": 12.0}\n')
    with pytest.raises(ValueError, match="has not logged a step yet"):
        read_series(run)


def test_the_signal_file_stands_in_for_the_log_only_where_it_has_the_same_rows(run: Path) -> None:
    quick = read_series(run)
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    np.testing.assert_array_equal(quick.loss_T, np.float32([row["loss"] for row in rows]))
    log.write_text("\n".join([*lines, '{"step": 9']) + "\n")  # one line more: the log is read
    np.testing.assert_array_equal(read_series(run).loss_T, [row["loss"] for row in rows])
    np.testing.assert_array_equal(read_series(run).grad_linf_GT, quick.grad_linf_GT)
    for row in rows:
        row["loss"] += 1.0
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))  # other values
    np.testing.assert_array_equal(read_series(run).loss_T, [row["loss"] for row in rows])
