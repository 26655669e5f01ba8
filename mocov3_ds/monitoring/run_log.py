"""What a run shows while it trains: `metrics.jsonl`, sinks such as TensorBoard, a progress bar.

`metrics.jsonl` is the truth: one JSON line per step, written by the first rank. A resumed run first
drops the lines of steps that it will do again, so the file reads like that of an unbroken run.
"""

import contextlib
import json
import logging
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mocov3_ds.data.storage.atomic import Appender, sync_to_disk, write_text
from mocov3_ds.monitoring.run_review import RunReview
from mocov3_ds.monitoring.sinks import Sink, SinkOpener, TensorBoardSink

_IN_BAR = {"loss": "loss", "lr": "lr", "momentum": "m", "images_per_s": "img/s", "knn": "knn"}
"""name in a row -> name beside the progress bar"""

_NAMED_SPANS = 8

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
        self._total_steps = total_steps
        # at step 0 everything goes: the row of step 0 comes again as well
        gap = describe_gap(self._begin_rows(steps_done or -1), steps_done)
        if gap:
            _log.warning("%s %s", self._path, gap)
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
        with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
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
        self._begin_rows(step)
        self._close_sinks()
        self._sinks = self._open_sinks(step)
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

    def describe_troubles(self) -> list[str]:
        """Return what is wrong with the run so far, one line each; empty where nothing is."""
        return self._review.summarise() if self.speaks else []

    def close(self) -> None:
        """Finish the progress bar and the files."""
        if self.speaks:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._rows.close()
            self._close_sinks()

    def _write_row(self, row: dict[str, Any]) -> None:
        self._rows.append((json.dumps(row) + "\n").encode())
        for line in self._review.push(row):
            self.print_line(line)
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


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a `metrics.jsonl` without the rows of later steps.

    Args:
        path: The file, which may not exist yet.
        step: Number of the last step whose row stays.

    Returns:
        The rows that stay.

    Raises:
        OSError: The file cannot be written; its old content stays.
    """
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def describe_gap(rows: Sequence[Mapping[str, Any]], steps_done: int) -> str:
    """Say which steps have no row though they were done; empty where each has one.

    Args:
        rows: Rows of a `metrics.jsonl`.
        steps_done: Number of steps done.
    """
    missing = sorted({*range(1, steps_done + 1)} - {row["step"] for row in rows})
    if not missing:
        return ""
    spans: list[tuple[int, int]] = []
    for step in missing:
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    named = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans[:_NAMED_SPANS])
    more = f" and {len(spans) - _NAMED_SPANS} more places" if len(spans) > _NAMED_SPANS else ""
    noun = "row" if len(missing) == 1 else "rows"
    return (
        f"lacks the {noun} of step {named}{more} ({len(missing)} of {steps_done}), as a power cut, "
        "a full disk or an edit leaves it; the checkpoint has these steps, curves do not"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the accelerator, or of this process on a CPU.

    Args:
        device: The device of this rank.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
