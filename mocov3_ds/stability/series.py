"""How does a run folder become the plain arrays that `verdict.judge` takes?"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.encoders.load import read_run_config
from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.metrics_file import read_rows
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
    logged = read_rows(run / "metrics.jsonl")
    rows = [row for row in logged if "lr" in row]
    if not rows:
        raise ValueError(f"{run} has not logged a step yet.")
    begin: dict[str, Any] = next((row for row in logged if "knn_chance" in row), {})
    steps_T = np.array([row["step"] for row in rows], np.int64)
    groups, grad_linf_GT, rms_GT = _read_signals(run, steps_T)
    knn_rows = [row for row in rows if row.get("knn") is not None]
    epochs_per_step = rows[-1]["epoch"] / rows[-1]["step"]
    at_start, at_end = _read_full_accuracies(run, logged)
    return Series(
        steps_T=steps_T,
        loss_T=_read_column(rows, "loss"),
        chance_loss=float(rows[-1]["chance_loss"]),
        lr_T=_read_column(rows, "lr"),
        groups=groups,
        grad_linf_GT=grad_linf_GT,
        rms_GT=rms_GT,
        knn_steps_K=np.array([row["step"] for row in knn_rows], np.int64),
        knn_K=_read_column(knn_rows, "knn"),
        probes=int(begin.get("knn_probes", config.knn.probes)),
        knn_chance=float(begin.get("knn_chance", 0.0)),
        total_steps=max(1, round(config.epochs / epochs_per_step)),
        epochs_per_step=epochs_per_step,
        stopped_non_finite=_stopped_at_bad_step(run, int(steps_T[-1])),
        twin_knn=twin_knn,
        knn_at_start=at_start,
        knn_at_end=at_end,
    )


def _read_full_accuracies(
    run: Path, logged: Sequence[dict[str, Any]]
) -> tuple[float | None, float | None]:
    """Accuracy by a bank of its own of the random network and of the last step, where known.

    A run that began with trained weights has no random network.
    """
    full = {
        row["step"]: float(row["knn_full"]) for row in logged if row.get("knn_full") is not None
    }
    began_trained = json.loads((run / "config.json").read_text()).get("ancestry")
    at_end = full[max(full)] if full and max(full) > 0 else None
    return (None if began_trained else full.get(0)), at_end


def _read_column(rows: Sequence[dict[str, Any]], name: str) -> Array:
    """Values of a column, NaN where there is none."""
    return np.array([row.get(name) if row.get(name) is not None else np.nan for row in rows], float)


def _read_signals(run: Path, steps_T: Steps) -> tuple[tuple[str, ...], Array, Array]:
    """Groups, largest gradients and RMS at the logged steps; no groups where none were logged."""
    if not (run / "signals.json").exists():
        empty = np.empty((0, len(steps_T)))
        return (), empty, empty
    table = signal_file.read_signals(run)
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


def _stopped_at_bad_step(run: Path, last: int) -> bool:
    """Whether the run ended at a step that was dropped: one reported after the last logged row."""
    for path in (run / "trouble").glob("step-*.json"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match is not None and int(match[1]) > last:
            return True
    return False
