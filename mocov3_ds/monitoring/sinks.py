"""Places that a run's rows go to besides `metrics.jsonl`; today TensorBoard is the only one.

A new place is a class with the methods of `Sink`, given to `RunLog` as one more of its `sinks`.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter


class Sink(Protocol):
    """Shows the rows of a run; what it raises costs the run only this sink."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of one step.

        Args:
            step: Number of optimizer steps done.
            values: Name -> number; the same names as in `metrics.jsonl`.
        """
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


SinkOpener = Callable[[Path, int], Sink]
"""opens a sink, given the run folder and the number of steps done; later steps will come again"""


class TensorBoardSink:
    """Writes curves to RUN/tensorboard.

    Args:
        run: The run folder.
        steps_done: Number of optimizer steps done; curves of later steps are hidden.
    """

    def __init__(self, run: Path, steps_done: int) -> None:
        _hide_writer_tracebacks()
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=steps_done + 1)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve.

        Args:
            step: Number of optimizer steps done.
            values: Name of a curve -> number.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


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
