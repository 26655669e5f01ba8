"""Places that a run's rows go to besides `metrics.jsonl`, one class each; `trackers` has more.

    TensorBoardSink   curves, hyper-parameters and pictures in RUN/tensorboard
    CsvSink           the rows as RUN/metrics.csv

The name of a value begins with the group that it is shown in: `train/loss`, `knn/knn`,
`layers/grad_linf/block_0`, `system/images_per_s`. The part behind the group is its name in
`metrics.jsonl` (`layers/`: a signal of `signals.f32`; `system/machine_*` is measured for sinks
alone).
"""

import csv
import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.metrics_file import Row, read_rows
from mocov3_ds.monitoring.run_facts import read_facts


class Sink(Protocol):
    """Shows the rows of a run; what it raises costs the run only rows of this sink."""

    def show_row(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of one step.

        Args:
            step: Number of optimizer steps done.
            values: GROUP/NAME -> number, as the run log groups them.
        """
        ...

    def show_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show a picture.

        Args:
            step: Number of optimizer steps done.
            name: GROUP/NAME of the picture.
            picture: What is shown, in RGB.
        """
        ...

    def drop_steps_after(self, step: int) -> None:
        """Forget later steps, which will come again.

        Args:
            step: Number of the last step that stays.
        """
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


SinkOpener = Callable[[Path, int], Sink]
"""opens a sink, given the run folder and the number of steps done; later steps will come again"""

_SYSTEM = ("images_per_s", "cpu_s", "data_wait_s", "save_s", "stand_ins")
_SYSTEM_PREFIXES = ("memory_", "store_", "cache_", "machine_")


def group_of(name: str) -> str:
    """Return the group in which a value of `metrics.jsonl` is shown.

    Args:
        name: Key of a row, such as `loss`.
    """
    if name.startswith("knn"):
        return "knn"
    return "system" if name in _SYSTEM or name.startswith(_SYSTEM_PREFIXES) else "train"


def grouped_numbers(row: Row) -> dict[str, float]:
    """Return GROUP/NAME -> number of each number in a row of `metrics.jsonl`.

    A switch counts as 0 or 1, a list as its length; text and null are left out.

    Args:
        row: JSON values by name.
    """
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if name == "step":
            continue
        if isinstance(value, list):
            numbers[f"{group_of(name)}/{name}"] = len(value)
        elif isinstance(value, bool | int | float):
            numbers[f"{group_of(name)}/{name}"] = int(value) if isinstance(value, bool) else value
    return numbers


class TensorBoardSink:
    """Writes curves, hyper-parameters and pictures to RUN/tensorboard.

    Args:
        run: The run folder.
        steps_done: Number of optimizer steps done; curves of later steps are hidden.
    """

    def __init__(self, run: Path, steps_done: int) -> None:
        _hide_writer_tracebacks()
        self._folder = run / "tensorboard"
        is_new = not self._folder.exists()
        self._writer = self._open_writer(steps_done)
        if is_new:
            file = self._writer._get_file_writer()  # type: ignore[no-untyped-call]
            for summary in hparams(read_facts(run), {}):  # type: ignore[no-untyped-call]
                file.add_summary(summary)

    def _open_writer(self, steps_done: int) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=steps_done + 1)

    def show_row(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve.

        Args:
            step: Number of optimizer steps done.
            values: Name of a curve -> number.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add a picture.

        Args:
            step: Number of optimizer steps done.
            name: Name of the picture.
            picture: What is shown, in RGB.
        """
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def drop_steps_after(self, step: int) -> None:
        """Hide the points of later steps.

        Args:
            step: Number of the last step that stays.
        """
        self._writer.close()
        self._writer = self._open_writer(step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class CsvSink:
    """Writes RUN/metrics.csv: the numbers of `metrics.jsonl`, one line a step.

    A column that comes up later is added to the whole file.

    Args:
        run: The run folder.
        steps_done: Number of optimizer steps done; lines of later steps are dropped.
    """

    def __init__(self, run: Path, steps_done: int) -> None:
        self._log, self._path = run / "metrics.jsonl", run / "metrics.csv"
        self._columns = ["step"]
        self._write_whole(self._read_lines(steps_done))

    def show_row(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line.

        Args:
            step: Number of optimizer steps done.
            values: GROUP/NAME -> number; layer signals and figures of the machine are left out.
        """
        line = _line(step, values)
        if set(line) <= set(self._columns):
            self._file.append(self._format([line]))
        else:
            self._file.close()
            self._write_whole([*self._read_lines(step - 1), line])

    def show_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Do nothing: there are no pictures in a table."""

    def drop_steps_after(self, step: int) -> None:
        """Remove the lines of later steps.

        Args:
            step: Number of the last step that stays.
        """
        self._file.close()
        self._write_whole(self._read_lines(step))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _read_lines(self, last: int) -> list[dict[str, float]]:
        """Read the lines up to a step from `metrics.jsonl`."""
        rows = [row for row in read_rows(self._log) if row["step"] <= last]
        return [_line(row["step"], grouped_numbers(row)) for row in rows]

    def _write_whole(self, lines: list[dict[str, float]]) -> None:
        """Write the file anew, with a column for each value that a line has."""
        names = (name for line in lines for name in line)
        self._columns = list(dict.fromkeys([*self._columns, *names]))
        head = ",".join(self._columns) + "\n"
        atomic.write_text(self._path, head + self._format(lines).decode())
        self._file = atomic.Appender(self._path)

    def _format(self, lines: list[dict[str, float]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(lines)
        return text.getvalue().encode()


def _line(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Return column -> value of a line: what `metrics.jsonl` has, not what is for curves alone."""
    numbers = {
        name.partition("/")[2]: value
        for name, value in values.items()
        if not name.startswith(("layers/", "system/machine_"))
    }
    return {"step": step, **numbers}


def _hide_writer_tracebacks() -> None:
    """Let TensorBoard's thread fail without a traceback: the next `row` raises the same error."""
    show = threading.excepthook
    if getattr(show, "hides_writer", False):
        return

    def show_others(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            show(failure)

    show_others.hides_writer = True  # type: ignore[attr-defined]
    threading.excepthook = show_others
