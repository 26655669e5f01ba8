"""What a run does about steps that are not to be trusted: stop, skip, or rewind.

`step.train_step` drops a step whose loss or gradient is not finite, or a spike by the limits that
come from here, on all ranks alike. This file keeps count, remembers what a spike is measured
against, and says how the run goes on. All of it is part of each checkpoint, so that a resumed run
answers what an unbroken one does.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from mocov3_ds.config import TroubleConfig

_ENOUGH = 20
"""Steps whose median a spike can be measured against."""


class Guard:
    """Counts the bad steps of a run, and sets the limits of the coming one.

    Args:
        config: what the user wants.
        state: of an earlier sitting, see `state`; empty for none.
    """

    def __init__(self, config: TroubleConfig, state: Mapping[str, Any]) -> None:
        self.config = config
        self.count: int = state.get("count", 0)
        """bad steps so far"""
        self.left_out: list[list[int]] = [list(span) for span in state.get("left_out", [])]
        """first and last global batch, counted from 0, of each range that taught nothing"""
        self.returned_to: int | None = state.get("returned_to")
        """step of the checkpoint that the run was last rewound to"""
        self._losses: deque[float] = deque(state.get("losses", []), config.window)
        self._norms: deque[float] = deque(state.get("norms", []), config.window)

    def loss_limit(self) -> float:
        """Largest loss that the coming step may have."""
        return _limit(self._losses, self.config.loss_spike)

    def norm_limit(self) -> float:
        """Largest norm of the whole gradient that the coming step may have."""
        return _limit(self._norms, self.config.gradient_spike)

    def passed(self, loss: float, norm: float) -> None:
        """Take note of a step that was applied."""
        if self.config.loss_spike:
            self._losses.append(loss)
        if self.config.gradient_spike:
            self._norms.append(norm)

    def failed(self, first: int, last: int) -> None:
        """Take note of a bad step, and of the global batches that are lost with it."""
        self.count += 1
        while self.left_out and self.left_out[-1][0] >= first:  # rewound before those, this time
            self.left_out.pop()
        self.left_out.append([first, last])

    @property
    def exhausted(self) -> bool:
        """Whether there were more bad steps than the user allows."""
        return self.count > self.config.limit

    def state(self) -> dict[str, Any]:
        """What the next sitting has to know, as JSON values."""
        return {
            "count": self.count,
            "left_out": self.left_out,
            "returned_to": self.returned_to,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }


def _limit(recent: deque[float], factor: float) -> float:
    if not factor or len(recent) < min(_ENOUGH, recent.maxlen or 0):
        return math.inf
    return factor * statistics.median(recent)
