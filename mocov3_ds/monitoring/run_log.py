"""What a run shows while it trains: `metrics.jsonl`, sinks such as TensorBoard, a progress bar.

`metrics.jsonl` is the truth: one JSON line per step, written by the first rank. A resumed run first
drops the lines of steps that it will do again, so the file reads like that of an unbroken run.
"""

import json
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mocov3_ds.data.storage.atomic import Appender, write_text
from mocov3_ds.monitoring.sinks import Sink, SinkOpener, TensorBoardSink

_IN_BAR = {"loss": "loss", "lr": "lr", "momentum": "m", "images_per_s": "img/s", "knn": "knn"}
"""name in a row -> name beside the progress bar"""

_log = logging.getLogger("mocov3_ds")


class RunLog:
    """Logs a run on the first rank; on the other ranks each call does nothing.

    Args:
        folder: The run folder.
        steps_done: Number of optimizer steps that earlier attempts have done.
        total_steps: Number of steps of the complete run.
        speaks: Whether this is the first rank.
        sinks: Openers of the places that rows go to besides `metrics.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps_done: int,
        total_steps: int,
        speaks: bool,
        sinks: Sequence[SinkOpener] = (TensorBoardSink,),
    ) -> None:
        self.speaks = speaks
        self._bar_values: dict[str, str] = {}
        if not speaks:
            return
        self._folder, self._openers = folder, sinks
        self._path = folder / "metrics.jsonl"
        # at step 0 everything goes: the row of step 0 comes again as well
        drop_rows_after(self._path, steps_done or -1)
        self._rows = Appender(self._path)
        self._sinks = self._open_sinks(steps_done)
        self._bar = tqdm(
            total=total_steps, initial=steps_done, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def log_step(self, row: dict[str, Any]) -> None:
        """Log the values of one step.

        Args:
            row: JSON values by name; `step` is the number of optimizer steps done, from 1.
        """
        if not self.speaks:
            return
        self._write_row(row)
        for key, name in _IN_BAR.items():
            if row.get(key) is not None:
                self._bar_values[name] = f"{row[key]:.4g}"
        self._bar.set_postfix(self._bar_values, refresh=False)
        self._bar.update(1)

    def log_values(self, step: int, **values: float) -> None:
        """Log values that belong to no training step, such as an accuracy before the first.

        Args:
            step: Number of optimizer steps done.
            values: Numbers to log, by name.
        """
        if self.speaks:
            self._write_row({"step": step, **values})

    def drop_steps_after(self, step: int) -> None:
        """Forget the later steps, because the run was rewound and will do them again.

        Args:
            step: Number of the last step that stays.
        """
        if not self.speaks:
            return
        self._rows.close()
        drop_rows_after(self._path, step)
        self._rows = Appender(self._path)
        self._close_sinks()
        self._sinks = self._open_sinks(step)
        self._bar.n = step
        self._bar.refresh()

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar.

        Args:
            text: The line, without its end.
        """
        if self.speaks:
            self._bar.write(text)

    def close(self) -> None:
        """Finish the progress bar and the files."""
        if self.speaks:
            self._bar.close()
            self._rows.close()
            self._close_sinks()

    def _write_row(self, row: dict[str, Any]) -> None:
        self._rows.append((json.dumps(row) + "\n").encode())
        step = row["step"]
        values = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        for sink in [*self._sinks]:
            try:
                sink.row(step, values)
            except Exception as error:  # a sink is no reason to end a run
                self._sinks.remove(sink)
                _warn_of_sink(type(sink).__name__, error)

    def _open_sinks(self, steps_done: int) -> list[Sink]:
        sinks = []
        for opener in self._openers:
            try:
                sinks.append(opener(self._folder, steps_done))
            except Exception as error:  # a sink is no reason to end a run
                _warn_of_sink(getattr(opener, "__name__", str(opener)), error)
        return sinks

    def _close_sinks(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # a sink is no reason to end a run
                _warn_of_sink(type(sink).__name__, error)


def _warn_of_sink(name: str, error: Exception) -> None:
    _log.warning("%s failed and gets nothing more until the next start: %s", name, error)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, without lines that a kill cut short or a disk damaged.

    Args:
        path: The file, which may not exist yet.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a `metrics.jsonl` without the rows of later steps.

    Args:
        path: The file, which may not exist yet.
        step: Number of the last step whose row stays.

    Raises:
        OSError: The file cannot be written; its old content stays.
    """
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the accelerator, or of this process on a CPU.

    Args:
        device: The device of this rank.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
