"""When is a step bad, and how many bad steps has a run had?

`step.train_step` drops a step whose loss or gradient is not finite, or above the limits that come
from here, on all ranks alike; `faults.bad_step_policy` says how the run goes on. This file counts
the bad steps and remembers what a spike is measured against. All of it is part of each checkpoint,
so that a resumed run judges its steps as an unbroken one does.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from mocov3_ds.config.parts import TroubleConfig

_STEPS_FOR_A_MEDIAN = 20
"""applied steps whose median a spike can be measured against"""


class StepLimits:
    """Counts the bad steps of a run, and sets the limits of the coming one.

    Args:
        config: settings `--trouble.*` of the run.
        state: what `state` gave in an earlier attempt; empty for none.
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
        return _spike_limit(self._losses, self.config.loss_spike)

    def norm_limit(self) -> float:
        """Largest norm of the whole gradient that the coming step may have."""
        return _spike_limit(self._norms, self.config.gradient_spike)

    def note_applied_step(self, loss: float, norm: float) -> None:
        """Remember a step that moved the weights.

        Args:
            loss: its loss, the mean over all ranks.
            norm: norm of its whole gradient, before clipping.
        """
        if self.config.loss_spike:
            self._losses.append(loss)
        if self.config.gradient_spike:
            self._norms.append(norm)

    def note_bad_step(self, first: int, last: int) -> None:
        """Count a bad step, and note the global batches that are lost with it.

        Args:
            first: first of these global batches, counted from 0.
            last: last of them, the batch of the bad step itself.
        """
        self.count += 1
        while self.left_out and self.left_out[-1][0] >= first:  # rewound to before them, this time
            self.left_out.pop()
        self.left_out.append([first, last])

    @property
    def exhausted(self) -> bool:
        """Whether there were more bad steps than the user allows."""
        return self.count > self.config.limit

    def state(self) -> dict[str, Any]:
        """What the next attempt has to know, as JSON values."""
        return {
            "count": self.count,
            "left_out": self.left_out,
            "returned_to": self.returned_to,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }


def rewound_limits(
    config: TroubleConfig, present: StepLimits, saved_state: Mapping[str, Any]
) -> StepLimits:
    """Limits of a run that returns to a checkpoint: its medians, but the bad steps of all times.

    Args:
        config: settings `--trouble.*` of the run.
        present: limits at the bad step.
        saved_state: what the checkpoint holds of its own limits; empty in old ones.
    """
    state = present.state()
    history = {name: state[name] for name in ("count", "left_out", "returned_to")}
    return StepLimits(config, {**saved_state, **history})


def _spike_limit(recent: deque[float], factor: float) -> float:
    if not factor or len(recent) < min(_STEPS_FOR_A_MEDIAN, recent.maxlen or 0):
        return math.inf
    return factor * statistics.median(recent)
