"""What a run shows while it trains: `metrics.jsonl`, sinks such as TensorBoard, a progress bar.

`metrics.jsonl` is the truth: one JSON line per step, written by the first rank. A resumed run first
drops the lines of steps that it will do again, so the file reads like that of an unbroken run.
"""

import contextlib
import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from mocov3_ds.data.storage.atomic import Appender, sync_to_disk, write_text
from mocov3_ds.monitoring.background_sink import BackgroundSink
from mocov3_ds.monitoring.machine_figures import MachineFigures
from mocov3_ds.monitoring.metrics_file import describe_gap, drop_rows_after
from mocov3_ds.monitoring.run_review import RunReview
from mocov3_ds.monitoring.signal_file import BLOCK_SIGNALS
from mocov3_ds.monitoring.sinks import SinkOpener, grouped_numbers

_IN_BAR = {"loss": "loss", "lr": "lr", "momentum": "m", "images_per_s": "img/s", "knn": "knn"}
"""name in a row -> name beside the progress bar"""

PLAN = "plan.txt"
"""name of the file with the last comparison of plan and run"""

_LAYER_ROWS = 1000
"""rows with all layer signals that sinks get of a run; RUN/signals.f32 has every step"""
_CLOSE_S = 30.0
"""seconds that sinks have to finish at the end of a run"""

_log = logging.getLogger("mocov3_ds")


class RunLog:
    """Logs a run on the first rank; on the other ranks each call does nothing.

    Args:
        folder: The run folder.
        steps_done: Number of optimizer steps that earlier attempts have done.
        total_steps: Number of steps of the complete run.
        speaks: Whether this is the first rank.
        begins_at: Number of steps before the run's own first one, as one has that goes on from
            another run.
        sinks: Name -> opener of each place that rows go to besides `metrics.jsonl`.
        device: Device of this rank, whose figures the sinks get; None = the CPU.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps_done: int,
        total_steps: int,
        speaks: bool,
        begins_at: int = 0,
        sinks: Mapping[str, SinkOpener] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.speaks, self.first_step = speaks, steps_done + 1
        self._bar_values: dict[str, str] = {}
        if not speaks:
            return
        self._path = folder / "metrics.jsonl"
        self._total_steps = total_steps
        # at the beginning everything goes: the row from before the first step comes again as well
        last_kept = steps_done if steps_done > begins_at else begins_at - 1
        gap = describe_gap(self._begin_rows(last_kept), steps_done, begins_at)
        if gap:
            _log.warning("%s %s", self._path, gap)
        self._figures = MachineFigures(device or torch.device("cpu"))
        self._sinks = [
            BackgroundSink(name, opener, folder, steps_done)
            for name, opener in (sinks or {}).items()
        ]
        self._bar = tqdm(
            total=total_steps, initial=steps_done, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def log_step(self, row: dict[str, Any], layers: Mapping[str, float] | None = None) -> None:
        """Log the values of one step.

        Args:
            row: JSON values by name; `step` is the number of optimizer steps done, from 1.
            layers: Signals of the layer groups in this step, GROUP/SIGNAL -> number, for sinks.
        """
        if not self.speaks:
            return
        self._write_row(row, layers or {})
        for key, name in _IN_BAR.items():
            if row.get(key) is not None:
                self._bar_values[name] = f"{row[key]:.4g}"
        self._bar.set_postfix(self._bar_values, refresh=False)
        with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
            self._bar.update(1)

    def log_values(self, step: int, **values: float) -> None:
        """Log values that belong to no training step, such as an accuracy before the first.

        Args:
            step: Number of optimizer steps done.
            values: Numbers to log, by name.
        """
        if self.speaks:
            self._write_row({"step": step, **values}, {})

    def show_picture(self, step: int, name: str, draw: Callable[[], Image.Image]) -> None:
        """Show a picture in the sinks that can.

        Args:
            step: Number of optimizer steps done.
            name: GROUP/NAME of the picture.
            draw: Draws it, in RGB; called where there are sinks.
        """
        if self.speaks and self._sinks:
            picture = draw()
            for sink in self._sinks:
                sink.send(lambda opened: opened.show_picture(step, name, picture))

    def drop_steps_after(self, step: int) -> None:
        """Forget the later steps, because the run was rewound and will do them again.

        Args:
            step: Number of the last step that stays.
        """
        if not self.speaks:
            return
        self._rows.close()
        self._begin_rows(step)
        for sink in self._sinks:
            sink.send(lambda opened: opened.drop_steps_after(step))
        self._bar.n = step
        with contextlib.suppress(OSError):
            self._bar.refresh()

    def _begin_rows(self, step: int) -> list[dict[str, Any]]:
        """Go on behind a step with `metrics.jsonl`; returns its rows, which are reviewed again."""
        rows = drop_rows_after(self._path, step)
        self._review = RunReview(self._total_steps)
        for row in rows:
            self._review.push(row)
        self._rows = Appender(self._path)
        return rows

    def sync(self) -> None:
        """Put all rows on the disk, before a checkpoint promises that they are there."""
        if self.speaks:
            self._rows.append(b"")
            sync_to_disk(self._path)

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar, if there is still somebody to read it.

        Args:
            text: The line, without its end.
        """
        if self.speaks:
            with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
                self._bar.write(text)

    def tell_plan(self, text: str) -> None:
        """Print how the run compares with its plan, and keep it in RUN/plan.txt.

        Args:
            text: The comparison, one line.
        """
        self.print_line(text)
        if self.speaks:
            with contextlib.suppress(OSError):  # no reason to end a run
                write_text(self._path.with_name(PLAN), text + "\n")

    def describe_troubles(self) -> list[str]:
        """Return what is wrong with the run so far, one line each; empty where nothing is."""
        return self._review.summarise() if self.speaks else []

    def close(self, limit_s: float = _CLOSE_S) -> None:
        """Finish the progress bar, the files and the sinks.

        Args:
            limit_s: Seconds that all sinks together have to finish.
        """
        if self.speaks:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._rows.close()
            deadline = time.monotonic() + limit_s
            for sink in self._sinks:
                loss = sink.close(deadline)
                if loss:
                    _log.warning("--log %s; metrics.jsonl has all", loss)

    def _write_row(self, row: dict[str, Any], layers: Mapping[str, float]) -> None:
        self._rows.append((json.dumps(row) + "\n").encode())
        for line in self._review.push(row):
            self.print_line(line)
        if self._sinks:
            step = row["step"]
            values = grouped_numbers(row) | self._figures.read() | self._choose_layers(step, layers)
            for sink in self._sinks:
                sink.send(lambda opened: opened.show_row(step, values))

    def _choose_layers(self, step: int, layers: Mapping[str, float]) -> dict[str, float]:
        """Return the layer signals that sinks get of a step: all of them now and then."""
        is_due = step % max(self._total_steps // _LAYER_ROWS, 1) == 0
        chosen = {}
        for column, value in layers.items():
            group, _, signal = column.partition("/")
            if is_due or signal in BLOCK_SIGNALS:  # rare: each of them
                chosen[f"layers/{signal}/{group}"] = value
        return chosen


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory so far in GiB: of the accelerator, or of this process on a CPU.

    Args:
        device: The device of this rank.

    Returns:
        `memory_gib`, what tensors held or the process; on an accelerator also
        `memory_reserved_gib`, what the allocator held to give it to them.
    """
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        return {"memory_gib": allocated / 2**30, "memory_reserved_gib": reserved / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
