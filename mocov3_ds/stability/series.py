"""A run folder as the plain arrays that `verdict.judge` takes."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.encoders.load import read_run
from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.run_log import read_rows
from mocov3_ds.stability.verdict import Array, Series, Steps


def read_series(run: Path, *, twin_knn: float | None = None) -> Series:
    """Read `config.json`, `metrics.jsonl` and `signals.f32` of a run, finished or not.

    Args:
        run: run folder.
        twin_knn: final accuracy in percent of the twin with a frozen patch projection.

    Raises:
        ValueError: no run, or one without a logged step.
    """
    config = read_run(run)
    logged = read_rows(run / "metrics.jsonl")
    rows = [row for row in logged if "lr" in row]
    if not rows:
        raise ValueError(f"{run} has not logged a step yet.")
    first = next((row for row in logged if "knn_chance" in row), {})
    steps_T = np.array([row["step"] for row in rows], np.int64)
    groups, grad_linf_GT, rms_GT = _signals(run, steps_T)
    knn = [(row["step"], row["knn"]) for row in rows if row.get("knn") is not None]
    epochs_of_a_step = rows[-1]["epoch"] / rows[-1]["step"]
    return Series(
        steps_T=steps_T,
        loss_T=_column(rows, "loss"),
        chance_loss=float(rows[-1]["chance_loss"]),
        lr_T=_column(rows, "lr"),
        groups=groups,
        grad_linf_GT=grad_linf_GT,
        rms_GT=rms_GT,
        knn_steps_K=np.array([step for step, _ in knn], np.int64),
        knn_K=np.array([value for _, value in knn], float),
        probes=int(first.get("knn_probes", config.knn.probes)),
        knn_chance=float(first.get("knn_chance", 0.0)),
        total_steps=max(1, round(config.epochs / epochs_of_a_step)),
        stopped_non_finite=_stopped(run, int(steps_T[-1])),
        twin_knn=twin_knn,
    )


def _column(rows: list[dict[str, Any]], name: str) -> Array:
    """Values of a column, NaN where there is none."""
    return np.array([row.get(name) if row.get(name) is not None else np.nan for row in rows], float)


def _signals(run: Path, steps_T: Steps) -> tuple[tuple[str, ...], Array, Array]:
    """Groups, largest gradients and RMS at the logged steps; no groups where none were logged."""
    if not (run / "signals.json").exists():
        nothing = np.empty((0, len(steps_T)))
        return (), nothing, nothing
    table = signal_file.read(run)
    _, here, there = np.intersect1d(steps_T, table.steps, return_indices=True)
    arrays = []
    for signal in ("grad_linf", "rms"):
        array_GT = np.full((len(table.groups), len(steps_T)), np.nan)
        array_GT[:, here] = table.grid(signal)[:, there]
        arrays.append(array_GT)
    return table.groups, arrays[0], arrays[1]


def _stopped(run: Path, last: int) -> bool:
    """Whether the run ended at a step that was dropped: one written down behind the last row."""
    for path in (run / "trouble").glob("step-*.json"):
        name = re.fullmatch(r"step-(\d+)", path.stem)
        if name is not None and int(name[1]) > last:
            return True
    return False
