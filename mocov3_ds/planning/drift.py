"""A run's memory and step time as planned and as measured, in one line of its log."""

import statistics
import time
from collections import deque
from itertools import pairwise

import psutil
import torch

from mocov3_ds.planning.hardware import GIB
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.pace import Pace

SETTLED = 20
"""steps after which the allocator has seen everything that comes each step"""


class Drift:
    """Says the line once the run has settled, and at its end. Make it before the run is built.

    On a GPU the allocator's peak is compared. On the CPU the resident set is, by what it grew since
    this was made: loader, k-NN monitor and copies for checkpoints are in it, which the plan of what
    a card holds leaves out.

    Args:
        device: where the run is.
    """

    def __init__(self, device: torch.device) -> None:
        cpu = device.type == "cpu"
        self._before = psutil.Process().memory_info().rss / GIB if cpu else 0.0
        self._steps = 0
        self._ends: deque[float] = deque(maxlen=SETTLED)

    def line(self, plan: Memory, measured_gib: float, pace: Pace | None = None) -> str:
        """The line, from the plan of this rank and its peak as `memory_gib` measures it.

        Time is compared where `pace` is known: that of cards whose rates the planner has.
        """
        planned, measured = plan.total / GIB, measured_gib - self._before
        also = "; with loader, k-NN and copies for checkpoints" if self._before else ""
        beside = f", beside {self._before:.2f} of the program itself" if self._before else ""
        return (
            f"plan: memory {planned:.2f} GiB planned, {measured:.2f} measured "
            f"({100 * (measured / planned - 1):+.0f} %{also}){beside}{self._time(pace)}"
        )

    def _time(self, pace: Pace | None) -> str:
        """The part about time: the median of the last steps, waiting for data included."""
        if pace is None or len(self._ends) < 2:
            return ""
        took = statistics.median(end - begin for begin, end in pairwise(self._ends))
        off = 100 * (took / pace.step - 1)
        return f"; a step {pace.step:.2f} s planned, {took:.2f} measured ({off:+.0f} %)"

    def due(self, last: bool) -> bool:
        """Count a step; whether the line is to be said after it."""
        self._steps += 1
        self._ends.append(time.monotonic())
        return self._steps == SETTLED or last
