"""The signals of a run, one row a step, in one compact file of columns.

    RUN/signals.json   what the columns are
    RUN/signals.f32    rows of little-endian float32, appended; NaN where nothing was measured

A row holds the scalars, then each layer group's signals, groups from input to output:

    step, lr, loss, ...; patch_embed/grad_linf, patch_embed/grad_l2, ..., predictor/cosine

Some columns are filled every few steps only (features, attention, k-NN). The file is cut back at a
resume, so it reads like that of an unbroken run, and a row that a kill cut short is ignored.

    table = read(run)
    table.steps                                (T,) int64
    table.column("patch_embed", "rms_before")  (T,) float32, NaN where not measured
    table.scalar("knn")                        (T,) float32
    steps_K, values_K = table.measured("knn")  only where measured

Shape suffixes: T = steps logged, C = columns, K = steps at which a column was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mocov3_ds.data.storage import atomic

Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]

VERSION = 1

SCALARS: dict[str, str] = {
    "step": "optimizer steps done, from 1",
    "lr": "learning rate of the step, before any tensor's own factor",
    "loss": "mean over the global batch; NaN where it was not finite",
    "features_std": "every 10 steps: standard deviation of l2-normalised queries over the global "
    "batch, mean of the dimensions; 1/sqrt(dimensions) when healthy, 0 when collapsed",
    "features_rank": "every 10 steps: effective rank exp(entropy) of the queries' second moment",
    "positive": "every 10 steps: mean cosine of a query and its own key",
    "negative": "every 10 steps: mean cosine of a query and the other keys",
    "knn": "every --knn.every_steps: accuracy in percent of the base encoder",
    "knn_momentum": "at the same steps: of the momentum encoder",
}
"""Columns that belong to the whole run, and what each means."""

SIGNALS: dict[str, str] = {
    "grad_linf": "largest |gradient| of all elements; of the gradient that the optimizer was given",
    "grad_l2": "largest L2 norm of a tensor's gradient",
    "weight_l2": "largest L2 norm of a tensor before the step",
    "update_l2": "largest L2 norm of a tensor's own movement in this step (LARS: what this step's "
    "gradient adds to it)",
    "trust": "largest factor on the direction (LAMB's and LARS's trust ratio, AdamW's update clip) "
    "of the tensors that have one",
    "trust_min": "the smallest such factor",
    "rms": "largest RMS of g / sqrt(v) of a tensor, v with this step's g in it, bias-corrected "
    "(StableAdamW's RMS_t; at most sqrt(1 / (1 - beta2)))",
    "rms_before": "the same with v from before this step: unbounded",
    "cosine": "smallest cosine of a tensor's gradient and its momentum before the step",
    "max_logit": "every 50 steps, three blocks: largest attention logit on 8 images of rank 0",
    "entropy": "every 50 steps, three blocks: mean entropy of the attention, nats",
}
"""Columns of each layer group: extremes over its tensors, since a spike sits in one of them."""


def column_names(groups: tuple[str, ...]) -> tuple[str, ...]:
    """C names: the scalars, then "group/signal"."""
    return (*SCALARS, *(f"{group}/{signal}" for group in groups for signal in SIGNALS))


@dataclass(frozen=True, eq=False)
class Table:
    """What a run's signal file holds.

    Attributes:
        groups: layer groups from input to output; the frozen ones have NaN columns.
        signals: names of the signals of each group.
        scalars: names of the columns of the whole run.
        values_TC: float32 rows, ascending by step.
        columns: C names.
    """

    groups: tuple[str, ...]
    signals: tuple[str, ...]
    scalars: tuple[str, ...]
    values_TC: Floats
    columns: tuple[str, ...]

    @property
    def steps(self) -> Steps:
        """Optimizer steps done at each row, (T,), ascending, not always without gaps."""
        return self.scalar("step").astype(np.int64)

    def column(self, group: str, signal: str) -> Floats:
        """One signal of one group, (T,), NaN where not measured.

        Raises:
            ValueError: there is no such group or signal.
        """
        return self.scalar(f"{group}/{signal}")

    def scalar(self, name: str) -> Floats:
        """One column of the whole run, (T,), NaN where not measured.

        Raises:
            ValueError: there is no such column.
        """
        if name not in self.columns:
            raise ValueError(
                f"the signal file has no column {name!r}; it has {', '.join(self.scalars)} and "
                f"GROUP/SIGNAL of the groups {', '.join(self.groups)} and the signals "
                f"{', '.join(self.signals)}."
            )
        column_T: Floats = self.values_TC[:, self.columns.index(name)]
        return column_T

    def measured(self, name: str) -> tuple[Steps, Floats]:
        """Steps (K,) and values (K,) of a column where it was measured."""
        values_T = self.scalar(name)
        there_T = ~np.isnan(values_T)
        return self.steps[there_T], values_T[there_T]

    def grid(self, signal: str) -> Floats:
        """One signal of all groups, (groups, T): the heat map's rows from input to output."""
        return np.stack([self.column(group, signal) for group in self.groups])


def read(run: Path) -> Table:
    """The signals of a run folder, also of one that is still going on.

    Raises:
        ValueError: the run has no signal file (`--signals.every 0`), or it is damaged.
    """
    header = _header(run)
    columns = tuple(header["columns"])
    rows_TC = _rows(run / "signals.f32", len(columns))
    return Table(
        groups=tuple(header["groups"]),
        signals=tuple(header["signals"]),
        scalars=tuple(header["scalars"]),
        values_TC=rows_TC,
        columns=columns,
    )


def _header(run: Path) -> dict[str, Any]:
    path = run / "signals.json"
    try:
        header: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{run} has no signals.json: it was trained with --signals.every 0, or is no run."
        ) from None
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not valid JSON.") from None
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {header.get('version')}, this program reads {VERSION}."
        )
    return header


def _rows(path: Path, columns: int) -> Floats:
    """Whole rows (T, C) of a file; T = 0 where there is none."""
    if not path.exists():
        return np.empty((0, columns), np.float32)
    values = np.fromfile(path, "<f4")
    rows: Floats = values[: len(values) // columns * columns].reshape(-1, columns)
    return rows


class SignalFile:
    """Writes the rows of one run; opened on the first rank only.

    Args:
        run: run folder.
        groups: layer groups from input to output.
        steps_done: optimizer steps of earlier sittings; later rows are dropped.
    """

    def __init__(self, run: Path, groups: tuple[str, ...], *, steps_done: int) -> None:
        self.columns = column_names(groups)
        self._place = {name: place for place, name in enumerate(self.columns)}
        path, header = run / "signals.f32", run / "signals.json"
        kept_TC = _kept(run, self.columns, steps_done)
        aside = path.with_suffix(".tmp")
        kept_TC.astype("<f4").tofile(aside)
        _write(header, groups)
        aside.replace(path)
        self._file = atomic.Appender(path)

    def write(self, values: Mapping[str, float]) -> Floats:
        """Append one row (C,); columns that are not named hold NaN."""
        row_C = np.full(len(self.columns), np.nan, "<f4")
        for name, value in values.items():
            row_C[self._place[name]] = value
        self._file.append(row_C.tobytes())
        return row_C

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def _kept(run: Path, columns: tuple[str, ...], steps_done: int) -> Floats:
    """Rows of earlier sittings in today's columns, those of steps that will be done again left out.

    A file that another version wrote with other columns keeps what both know.
    """
    if steps_done == 0 or not (run / "signals.json").exists():
        return np.empty((0, len(columns)), np.float32)
    table = read(run)
    old_TC = table.values_TC[table.steps <= steps_done]
    if table.columns == columns:
        return old_TC
    kept_TC = np.full((len(old_TC), len(columns)), np.nan, np.float32)
    for place, name in enumerate(columns):
        if name in table.columns:
            kept_TC[:, place] = old_TC[:, table.columns.index(name)]
    return kept_TC


def _write(path: Path, groups: tuple[str, ...]) -> None:
    header = {
        "version": VERSION,
        "dtype": "<f4",
        "columns": column_names(groups),
        "groups": groups,
        "scalars": SCALARS,
        "signals": SIGNALS,
    }
    atomic.write_text(path, json.dumps(header, indent=1))


# what one step measured -> a row


_LARGEST = ("grad_linf", "grad_l2", "weight_l2", "update_l2", "rms", "rms_before")


class ByGroup:
    """Extremes of each layer group over its tensors; which tensor is where is found once.

    Args:
        groups: layer groups from input to output.
        of_names: group of each tensor, in the order of the tables.
    """

    def __init__(self, groups: tuple[str, ...], of_names: Sequence[str]) -> None:
        self._rows = {
            group: np.flatnonzero(np.array([name == group for name in of_names]))
            for group in groups
        }

    def __call__(self, table: Mapping[str, Floats]) -> dict[str, float]:
        """Column -> value of one step.

        Args:
            table: what the optimizer measured of each tensor: `grad_peak`, `grad_norm`,
                `weight_norm`, `update_norm`, `rate`, `trust_ratio`, `adapts`, `rms`, `rms_before`,
                `cosine`.
        """
        values = {
            "grad_linf": table["grad_peak"],
            "grad_l2": table["grad_norm"],
            "weight_l2": table["weight_norm"],
            "update_l2": table["rate"] * table["trust_ratio"] * table["update_norm"],
            "rms": table["rms"],
            "rms_before": table["rms_before"],
        }
        trust = np.where(table["adapts"] > 0, table["trust_ratio"], np.nan)
        row = {}
        for group, rows in self._rows.items():
            for signal in _LARGEST:
                row[f"{group}/{signal}"] = _extreme(np.maximum, values[signal][rows])
            row[f"{group}/trust"] = _extreme(np.fmax, trust[rows])
            row[f"{group}/trust_min"] = _extreme(np.fmin, trust[rows])
            row[f"{group}/cosine"] = _extreme(np.fmin, table["cosine"][rows])
        return row


def _extreme(of: np.ufunc, values: Floats) -> float:
    """Largest or smallest value; NaN where there is none, or where the gradient was NaN."""
    return float(of.reduce(values)) if len(values) else float("nan")
