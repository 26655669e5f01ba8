"""How does a run folder become the plain arrays that `verdict.judge` takes?"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3_ds.encoders.load import read_run_config
from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.metrics_file import Row, SkimmedLog, read_rows, skim_rows
from mocov3_ds.monitoring.signal_file import SignalTable
from mocov3_ds.stability.findings import Array, Series, Steps


def read_series(run: Path, *, twin_knn: float | None = None) -> Series:
    """Read `config.json`, `metrics.jsonl` and `signals.f32` of a run, finished or not.

    Args:
        run: run folder, of a run that has ended or not.
        twin_knn: final accuracy in percent of the twin with a frozen patch projection.

    Raises:
        ValueError: the folder holds no run, or the run has not logged a step.
    """
    config = read_run_config(run)
    path = run / "metrics.jsonl"
    table = signal_file.read_signals(run) if (run / "signals.json").exists() else None
    skimmed = skim_rows(path, "knn")
    columns = _find_columns(skimmed, table)
    named, rows = skimmed.named, [row for row in skimmed.sample if "lr" in row]
    if columns is None:
        logged = read_rows(path)
        named, rows = logged, [row for row in logged if "lr" in row]
        if not rows:
            raise ValueError(f"{run} has not logged a step yet.")
        columns = _StepColumns(
            np.array([row["step"] for row in rows], np.int64),
            *(np.array([row.get(name) for row in rows], float) for name in ("loss", "lr")),
        )
    begin: Row = next((row for row in named if "knn_chance" in row), {})
    groups, grad_linf_GT, rms_GT = _take_signals(table, columns.steps_T)
    knn_rows = [row for row in named if "lr" in row and row.get("knn") is not None]
    epochs_per_step = rows[-1]["epoch"] / rows[-1]["step"]
    at_start, at_end = _read_full_accuracies(run, named)
    return Series(
        steps_T=columns.steps_T,
        loss_T=columns.loss_T,
        chance_loss=float(rows[-1]["chance_loss"]),
        lr_T=columns.lr_T,
        groups=groups,
        grad_linf_GT=grad_linf_GT,
        rms_GT=rms_GT,
        knn_steps_K=np.array([row["step"] for row in knn_rows], np.int64),
        knn_K=np.array([row["knn"] for row in knn_rows], float),
        probes=int(begin.get("knn_probes", config.knn.probes)),
        knn_chance=float(begin.get("knn_chance", 0.0)),
        total_steps=max(1, round(config.epochs / epochs_per_step)),
        epochs_per_step=epochs_per_step,
        stopped_non_finite=bool(list_bad_stops(run, int(columns.steps_T[-1]))),
        twin_knn=twin_knn,
        knn_at_start=at_start,
        knn_at_end=at_end,
    )


def _read_full_accuracies(run: Path, logged: Sequence[Row]) -> tuple[float | None, float | None]:
    """Accuracy by a bank of its own of the random network and of the last step, where known.

    A run that began with trained weights has no random network.
    """
    full = {
        row["step"]: float(row["knn_full"]) for row in logged if row.get("knn_full") is not None
    }
    began_trained = json.loads((run / "config.json").read_text()).get("ancestry")
    at_end = full[max(full)] if full and max(full) > 0 else None
    return (None if began_trained else full.get(0)), at_end


@dataclass(frozen=True, eq=False)
class _StepColumns:
    """Values of each logged step, (T,)."""

    steps_T: Steps
    loss_T: Array
    lr_T: Array


def _find_columns(skimmed: SkimmedLog, table: SignalTable | None) -> _StepColumns | None:
    """The steps' values of the signal file, where it has the rows of the log; else None.

    It does where it has as many steps as the log, each once, and the same values in the log's
    sample. They are float32 there, as the loss is in the log; reading 100,000 lines takes longer.
    """
    if table is None or not len(table.steps) or not {"loss", "lr"} <= {*table.scalars}:
        return None
    steps_T = table.steps
    rows = [row for row in skimmed.sample if "lr" in row]
    beside = sum("lr" not in row for row in skimmed.named)  # of the start, of no step
    is_each_once = bool(np.all(np.diff(steps_T) > 0)) and len(steps_T) == skimmed.lines - beside
    if not is_each_once or not rows or rows[-1]["step"] != steps_T[-1]:
        return None
    sampled = np.searchsorted(steps_T, [row["step"] for row in rows])
    for name in ("step", "loss", "lr"):
        in_log = np.array([row.get(name) for row in rows], float).astype(np.float32)
        if not np.array_equal(table.scalar(name)[sampled], in_log, equal_nan=True):
            return None
    return _StepColumns(steps_T, *(table.scalar(name).astype(float) for name in ("loss", "lr")))


def _take_signals(
    table: SignalTable | None, steps_T: Steps
) -> tuple[tuple[str, ...], Array, Array]:
    """Groups, largest gradients and RMS at the logged steps; no groups where none were logged."""
    if table is None:
        empty = np.empty((0, len(steps_T)))
        return (), empty, empty
    if np.array_equal(table.steps, steps_T):
        grad_linf_GT, rms_GT = table.grids("grad_linf", "rms")
        return table.groups, grad_linf_GT, rms_GT
    table_steps, from_the_end = np.unique(table.steps[::-1], return_index=True)
    logged_rows = np.flatnonzero(np.isin(steps_T, table_steps))
    # of a step that was measured again after a resume the last row counts
    last_rows = len(table.steps) - 1 - from_the_end
    table_rows = last_rows[np.searchsorted(table_steps, steps_T[logged_rows])]
    arrays = []
    for signal in ("grad_linf", "rms"):
        array_GT = np.full((len(table.groups), len(steps_T)), np.nan)
        array_GT[:, logged_rows] = table.grid(signal)[:, table_rows]
        arrays.append(array_GT)
    return table.groups, arrays[0], arrays[1]


def list_bad_stops(run: Path, last: int) -> list[tuple[int, Path]]:
    """Steps that were dropped after the last logged row, at which the run ended, and their reports.

    Args:
        run: run folder, with `trouble/` where there was one.
        last: step of the last row.
    """
    stops = []
    for path in sorted((run / "trouble").glob("step-*.json")):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match is not None and int(match[1]) > last:
            stops.append((int(match[1]), path))
    return stops
