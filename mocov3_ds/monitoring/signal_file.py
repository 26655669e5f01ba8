"""The signals of a run, one row a step, in one compact file of columns.

    RUN/signals.json   what the columns are
    RUN/signals.f32    rows of little-endian float32, appended; NaN where nothing was measured

A row holds the scalars, then each layer group's signals, groups from input to output:

    step, lr, loss, ...; patch_embed/grad_linf, patch_embed/grad_l2, ..., predictor/cosine

Some columns are filled only every few steps (features, attention, k-NN). When a run resumes, the
rows of steps that it will do again are dropped, so the file reads like that of an unbroken run. A
row that a kill cut short is ignored.

    table = read_signals(run)
    table.steps                                (T,) int64
    table.column("patch_embed", "rms_before")  (T,) float32, NaN where not measured
    table.scalar("knn")                        (T,) float32
    steps_K, values_K = table.measured("knn")  only where measured

Shape suffixes: T = steps logged, C = columns, K = steps at which a column was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mocov3_ds.data.storage import atomic

Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]

VERSION = 1

INSTRUMENTS: dict[str, str] = {
    "sharpness": "every --signals.sharpness_every, of the batch before its step: largest "
    "eigenvalue of P^-1 H, H the exact loss's Hessian, P Adam's sqrt(v) + eps (LARS, Muon: 1)",
    "sharpness_limit": "at the same steps: (2 + 2 beta1) / (1 - beta1) / lr, above which Adam's "
    "steps are unstable; of Adam alone",
    "curvature": "at the same steps: that along the gradient's step P^-1 g",
    "curvature_limit": "at the same steps: 2 / lr, above which such a step makes the loss rise",
    "noise_trace": "every --signals.noise_every, of the two halves of the batch before its step: "
    "trace of the covariance of one image's gradient",
    "gradient_square": "at the same steps: squared norm of the true gradient, unbiased (below 0 "
    "where the noise hides it)",
    "noise_scale": "at the same steps: noise_trace / gradient_square, images; averages over steps "
    "are to be taken of the two before dividing",
}
"""Those of `SCALARS` that `training.instruments` measures, in few steps or none."""

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
    **INSTRUMENTS,
}
"""Columns that belong to the whole run, with their meanings."""

BLOCK_SIGNALS: dict[str, str] = {
    "max_logit": "every 50 steps, of 8 images of rank 0: largest attention logit of a block",
    "entropy": "at the same steps: mean entropy of the block's attention, nats",
    "entropy_min": "at the same steps: mean entropy of its lowest head, nats",
    "block_rms": "at the same steps: RMS of the block's output",
    "qkv_rms": "at the same steps: RMS of the output of its layer attn.qkv",
    "proj_rms": "at the same steps: of attn.proj",
    "fc2_rms": "at the same steps: of mlp.fc2",
}
"""Those of `SIGNALS` that the blocks of a Vision Transformer have, every few tens of steps."""

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
    "update_ratio": "norm of the group's whole movement in this step over the norm of its weights",
    **BLOCK_SIGNALS,
}
"""Columns of each layer group: extremes over its tensors, because a spike sits in one of them."""


def column_names(groups: tuple[str, ...]) -> tuple[str, ...]:
    """Return the C names of the columns: the scalars, then "GROUP/SIGNAL".

    Args:
        groups: Layer groups from input to output.
    """
    return (*SCALARS, *(f"{group}/{signal}" for group in groups for signal in SIGNALS))


_ROWS_AT_ONCE = 4096  # rows that are read at a time where columns are picked


@dataclass(frozen=True, eq=False)
class SignalTable:
    """The content of a run's signal file.

    Attributes:
        groups: Layer groups from input to output; the columns of frozen ones are NaN.
        signals: Names of the signals of each group.
        scalars: Names of the columns that belong to the whole run.
        values_TC: Rows in float32, ascending by step.
        columns: Names of all C columns.
    """

    groups: tuple[str, ...]
    signals: tuple[str, ...]
    scalars: tuple[str, ...]
    values_TC: Floats
    columns: tuple[str, ...]

    @cached_property
    def steps(self) -> Steps:
        """Number of optimizer steps done at each row, (T,); ascending, possibly with gaps."""
        return self.scalar("step").astype(np.int64)

    def column(self, group: str, signal: str) -> Floats:
        """Return one signal of one group, (T,); NaN where it was not measured.

        Args:
            group: A layer group, such as `block_0`.
            signal: One of the keys of `SIGNALS`.

        Raises:
            ValueError: There is no such group or signal.
        """
        return self.scalar(f"{group}/{signal}")

    def scalar(self, name: str) -> Floats:
        """Return one column, (T,); NaN where it was not measured.

        Args:
            name: One of the keys of `SCALARS`, or "GROUP/SIGNAL".

        Raises:
            ValueError: There is no such column.
        """
        if name not in self.columns:
            raise ValueError(
                f"the signal file has no column {name!r}; it has {', '.join(self.scalars)} and "
                f"GROUP/SIGNAL of the groups {', '.join(self.groups)} and the signals "
                f"{', '.join(self.signals)}."
            )
        return self.values_TC[:, self.columns.index(name)]

    def measured(self, name: str) -> tuple[Steps, Floats]:
        """Return steps (K,) and values (K,) of a column where it was measured.

        Args:
            name: One of the keys of `SCALARS`, or "GROUP/SIGNAL".

        Raises:
            ValueError: There is no such column.
        """
        values_T = self.scalar(name)
        is_measured_T = ~np.isnan(values_T)
        return self.steps[is_measured_T], values_T[is_measured_T]

    def grid(self, signal: str) -> Floats:
        """Return one signal of all groups, (groups, T), groups from input to output.

        Args:
            signal: One of the keys of `SIGNALS`.
        """
        columns = [self.columns.index(f"{group}/{signal}") for group in self.groups]
        return np.ascontiguousarray(self.values_TC[:, columns].T)

    def grids(self, *signals: str) -> list[npt.NDArray[np.float64]]:
        """Return signals of all groups, (groups, T) each, as `grid`; the file is read once.

        Args:
            signals: Some of the keys of `SIGNALS`.
        """
        columns = [
            self.columns.index(f"{group}/{name}") for name in signals for group in self.groups
        ]
        values_CT = np.empty((len(columns), len(self.values_TC)))
        for first in range(0, len(self.values_TC), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            values_CT[:, rows] = self.values_TC[rows].take(columns, axis=1).T
        return np.split(values_CT, len(signals))


def read_signals(run: Path) -> SignalTable:
    """Read the signals of a run, which may still be training.

    Args:
        run: Folder of the run to read.

    Raises:
        ValueError: The run has no signal file (`--signals.every 0`), or it is damaged.
    """
    header = _read_header(run)
    columns = tuple(header["columns"])
    rows_TC = _read_rows(run / "signals.f32", len(columns))
    return SignalTable(
        groups=tuple(header["groups"]),
        signals=tuple(header["signals"]),
        scalars=tuple(header["scalars"]),
        values_TC=rows_TC,
        columns=columns,
    )


def _read_header(run: Path) -> dict[str, Any]:
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


def _read_rows(path: Path, columns: int) -> Floats:
    """Map the complete rows (T, C) of a file; T = 0 where the file does not exist.

    Rows that are appended later are not seen; the file is only ever replaced, not cut.
    """
    rows = path.stat().st_size // (4 * columns) if path.exists() else 0
    if rows == 0:
        return np.empty((0, columns), np.float32)
    return np.asarray(np.memmap(path, "<f4", "r", shape=(rows, columns)))


class SignalFile:
    """Writes the rows of one run; only the first rank opens it.

    Args:
        run: Folder of the run to read.
        groups: Layer groups from input to output.
        steps_done: Number of optimizer steps done; the rows of later steps are dropped.
    """

    def __init__(self, run: Path, groups: tuple[str, ...], *, steps_done: int) -> None:
        self.columns = column_names(groups)
        self._index = {name: index for index, name in enumerate(self.columns)}
        path = run / "signals.f32"
        earlier_TC = _read_earlier_rows(run, self.columns, steps_done)
        with atomic.replace_when_whole(path) as temporary:
            earlier_TC.astype("<f4").tofile(temporary)
            _write_header(run / "signals.json", groups)
        self._file = atomic.Appender(path)

    def write_row(self, values: Mapping[str, float]) -> Floats:
        """Append one row and return it, (C,).

        Args:
            values: Column -> value; all other columns become NaN.
        """
        row_C = np.full(len(self.columns), np.nan, "<f4")
        for name, value in values.items():
            row_C[self._index[name]] = value
        self._file.append(row_C.tobytes())
        return row_C

    def close(self) -> None:
        """Finish writing the file."""
        self._file.close()


def _read_earlier_rows(run: Path, columns: tuple[str, ...], steps_done: int) -> Floats:
    """Read the rows that stay when a run continues, in today's columns.

    Of a file that another version wrote with other columns, the columns that both know stay.
    """
    if steps_done == 0 or not (run / "signals.json").exists():
        return np.empty((0, len(columns)), np.float32)
    table = read_signals(run)
    rows_TC = table.values_TC[table.steps <= steps_done]
    if table.columns == columns:
        return rows_TC
    translated_TC = np.full((len(rows_TC), len(columns)), np.nan, np.float32)
    for index, name in enumerate(columns):
        if name in table.columns:
            translated_TC[:, index] = rows_TC[:, table.columns.index(name)]
    return translated_TC


def _write_header(path: Path, groups: tuple[str, ...]) -> None:
    header = {
        "version": VERSION,
        "dtype": "<f4",
        "columns": column_names(groups),
        "groups": groups,
        "scalars": SCALARS,
        "signals": SIGNALS,
    }
    atomic.write_text(path, json.dumps(header, indent=1))


_LARGEST = ("grad_linf", "grad_l2", "weight_l2", "update_l2", "rms", "rms_before")


class GroupExtremes:
    """Reduces what the optimizer measured of each tensor to the extremes of each layer group.

    Args:
        groups: Layer groups from input to output.
        tensor_groups: Layer group of each tensor, in the order of the optimizer's tables.
    """

    def __init__(self, groups: tuple[str, ...], tensor_groups: Sequence[str]) -> None:
        self._rows = {
            group: np.flatnonzero(np.array([name == group for name in tensor_groups]))
            for group in groups
        }

    def reduce_tensors(self, table: Mapping[str, Floats]) -> dict[str, float]:
        """Return column -> value of one step.

        Args:
            table: Values of each tensor that the optimizer measured: `grad_peak`, `grad_norm`,
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
                row[f"{group}/{signal}"] = _reduce_values(np.maximum, values[signal][rows])
            row[f"{group}/trust"] = _reduce_values(np.fmax, trust[rows])
            row[f"{group}/trust_min"] = _reduce_values(np.fmin, trust[rows])
            row[f"{group}/cosine"] = _reduce_values(np.fmin, table["cosine"][rows])
            moved, weight = (_joint_norm(values[f"{n}_l2"][rows]) for n in ("update", "weight"))
            row[f"{group}/update_ratio"] = moved / weight if weight > 0 else float("nan")
        return row


def _joint_norm(norms: Floats) -> float:
    """Return the norm of tensors together; 0 of none."""
    return float(np.linalg.norm(norms.astype(np.float64)))


def _reduce_values(extreme: np.ufunc, values: Floats) -> float:
    """Return the extreme value; NaN where there is none, or where a gradient was NaN."""
    return float(extreme.reduce(values)) if len(values) else float("nan")
