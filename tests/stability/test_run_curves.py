"""The log of one run as arrays, and long curves made short."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.monitoring.signal_file import SIGNALS, SignalTable, column_names
from mocov3_ds.stability.run_curves import (
    gradient_heat,
    heat_of_gradients,
    read_curves,
    shorten_curve,
)


def write_log(run: Path, rows: list[dict[str, object]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_become_curves(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        [
            {"step": 0, "knn_full": 10.0},
            {"step": 1, "loss": 3.0, "alarms": ["rms_high"], "applied": True},
            {"step": 2, "loss": None, "alarms": ["rms_high", "rms_rise"]},
            {"step": 3, "loss": 1.0, "knn_full": 30.0, "note": "text"},
        ],
    )
    curves, rows = read_curves(tmp_path)
    assert len(rows) == 4 and curves.signals is None
    steps_M, loss_M = curves.curve("loss")
    assert steps_M.tolist() == [1, 3] and loss_M.tolist() == [3.0, 1.0]
    assert (curves.first("knn_full"), curves.last("knn_full")) == (10.0, 30.0)
    assert (curves.median("loss"), curves.total("loss"), curves.total("no_such")) == (1.0, 4.0, 0)
    assert np.isnan(curves.last("no_such")) and len(curves.curve("note")[1]) == 0
    assert {name: steps.tolist() for name, steps in curves.alarms.items()} == {
        "rms_high": [1, 2],
        "rms_rise": [2],
    }


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 0, "knn_full": 10.0}])
    with pytest.raises(ValueError, match="has not logged a step yet"):
        read_curves(tmp_path)


def test_a_long_curve_keeps_its_extremes() -> None:
    steps_M = np.arange(1, 10_001)
    values_M = np.ones(10_000)
    values_M[5000], values_M[7000] = 9.0, -9.0
    steps_C, low_C, middle_C, high_C = shorten_curve(steps_M, values_M, 100)
    assert len(steps_C) == 100
    assert (high_C.max(), low_C.min()) == (9.0, -9.0)
    assert (middle_C == 1).all()
    assert abs(steps_C[np.argmax(high_C)] - 5001) < 60
    assert all((a == b).all() for a, b in zip(shorten_curve(steps_M[:9], values_M[:9]), (
        steps_M[:9], values_M[:9], values_M[:9], values_M[:9]), strict=True))  # fmt: skip


@pytest.mark.parametrize("rows", [101, 199, 200, 201, 5000, 9999])
def test_stretches_are_reduced_as_each_alone(rows: int) -> None:
    random = np.random.default_rng(rows)
    steps_M, values_M = np.cumsum(random.integers(1, 9, rows)), random.standard_cauchy(rows)
    values_M[random.integers(0, rows, 9)] = np.inf
    edges = np.linspace(0, rows, 101).astype(int)
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    shortened = shorten_curve(steps_M, values_M, 100)
    reductions = (np.mean, steps_M), (np.min, values_M), (np.median, values_M), (np.max, values_M)
    for short_C, (reduction, array_M) in zip(shortened, reductions, strict=True):
        expected_C = [reduction(array_M[piece]) for piece in pieces]
        np.testing.assert_array_equal(short_C, expected_C)


@pytest.mark.parametrize("steps", [40, 611, 4000])
def test_a_heat_map_is_that_of_each_stretch_alone(steps: int) -> None:
    grad_GT = np.exp(np.random.default_rng(steps).standard_normal((3, steps)))
    grad_GT[0, steps // 2 : steps // 2 + 9] = np.nan  # measured in other groups
    grad_GT[:, 3::5] = np.nan
    _, heat_GC = heat_of_gradients(["a", "b", "c"], grad_GT, 100)
    grad_GM = grad_GT[:, np.isfinite(grad_GT).any(0)]
    edges = np.linspace(0, grad_GM.shape[1], min(100, grad_GM.shape[1]) + 1).astype(int)
    pieces = [grad_GM[:, a:b] for a, b in itertools.pairwise(edges)]
    largest_GC, middle_GC = (
        np.stack([reduction(piece, axis=1) for piece in pieces], axis=1)
        for reduction in (np.max, np.median)
    )
    window = max(6, 30 * len(pieces) // grad_GM.shape[1])
    for column in range(window, len(pieces)):
        usual_G = np.median(middle_GC[:, column - window : column], axis=1)
        expected_G = np.log10(largest_GC[:, column] / usual_G)
        np.testing.assert_array_equal(heat_GC[:, column], expected_G)


def table_of(grad_GT: list[np.ndarray]) -> SignalTable:
    groups = ("frozen", "a", "b")
    columns = column_names(groups)
    values_TC = np.full((len(grad_GT[0]), len(columns)), np.nan, np.float32)
    values_TC[:, 0] = np.arange(1, len(grad_GT[0]) + 1)
    for group, grad_T in zip(groups[1:], grad_GT, strict=True):
        values_TC[:, columns.index(f"{group}/grad_linf")] = grad_T
    scalars = columns[: columns.index("frozen/grad_linf")]
    return SignalTable(groups, tuple(SIGNALS), scalars, values_TC, columns)


@pytest.mark.parametrize(("steps", "columns"), [(400, 600), (20_000, 500)])
def test_a_spike_is_hot_in_its_layer_alone(steps: int, columns: int) -> None:
    calm, spiky = np.full(steps, 0.1), np.full(steps, 0.1)
    spiky[steps // 2] = 1.0
    groups, heat_GC = gradient_heat(table_of([calm, spiky]), columns)
    assert list(groups) == ["a", "b"]  # a frozen one has no row
    assert heat_GC.shape[1] == min(steps, columns)
    assert np.nanmax(heat_GC[0]) == pytest.approx(0, abs=1e-6)
    assert np.nanmax(heat_GC[1]) == pytest.approx(1, abs=1e-6)
    hot = int(np.nanargmax(heat_GC[1]))
    assert abs(hot / heat_GC.shape[1] - 0.5) < 0.01
    assert np.isnan(heat_GC[:, 0]).all()


def test_no_signals_are_no_heat() -> None:
    assert gradient_heat(table_of([np.empty(0), np.empty(0)]))[1].size == 0
