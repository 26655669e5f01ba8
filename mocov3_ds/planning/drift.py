"""How far is a run from its plan? Memory and step time, planned and measured, in one log line."""

import statistics
import time
from collections import deque
from itertools import pairwise

import psutil
import torch

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.pace import Pace

SETTLED = 20
"""steps after which the allocator has seen everything that comes each step"""


class Drift:
    """Compares plan and run once the run has settled, and at its end.

    Make it before the run is built. On a GPU the allocator's peak is compared. On the CPU the
    resident set is, by what it grew since this object was made: loader, k-NN monitor and copies for
    checkpoints are in it, which the plan of what a card holds leaves out.

    Args:
        device: device of the run, a GPU or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        cpu = device.type == "cpu"
        self._program_gib = psutil.Process().memory_info().rss / GIB if cpu else 0.0
        self._steps = 0
        self._step_ends: deque[float] = deque(maxlen=SETTLED)

    def describe(
        self,
        plan: Memory,
        measured_gib: float,
        pace: Pace | None = None,
        *,
        reserved_gib: float = 0.0,
    ) -> str:
        """The line of the log.

        Args:
            plan: what the planner computes for this rank.
            measured_gib: peak of this rank's memory in GiB, the program itself included.
            pace: planned time of a step; None where the planner does not know the card.
            reserved_gib: peak of what a GPU's allocator held for it, GiB; 0 = it is not known.
        """
        planned, measured = plan.peak_bytes / GIB, measured_gib - self._program_gib
        extras, program = f"; {reserved_gib:.2f} reserved" if reserved_gib else "", ""
        if self._program_gib:
            extras = "; with loader, k-NN and copies for checkpoints"
            program = f", beside {self._program_gib:.2f} of the program itself"
        return (
            f"plan: memory {planned:.2f} GiB planned, {measured:.2f} measured "
            f"({100 * (measured / planned - 1):+.0f} %{extras}){program}{self._describe_time(pace)}"
        )

    def _describe_time(self, pace: Pace | None) -> str:
        """Time by the median of the last steps, waiting for data included."""
        if pace is None or len(self._step_ends) < 2:
            return ""
        measured = statistics.median(end - begin for begin, end in pairwise(self._step_ends))
        percent = 100 * (measured / pace.step_s - 1)
        return f"; a step {pace.step_s:.2f} s planned, {measured:.2f} measured ({percent:+.0f} %)"

    def record_step(self) -> None:
        """Note that a step has just ended."""
        self._steps += 1
        self._step_ends.append(time.monotonic())

    def is_due(self, last: bool) -> bool:
        """Whether the line is to be logged after the step that was recorded last.

        Args:
            last: whether it was the last step of the run.
        """
        return self._steps == SETTLED or last
