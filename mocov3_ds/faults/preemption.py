"""End in good order when the machine is taken away: SIGTERM and SIGUSR1 end the run after a step.

Slurm (`--signal=USR1@120`), Kubernetes and spot instances send one of them some time before they
kill. After the first signal the step is finished, a checkpoint is written and the exit status is 0.
A second signal ends the process at once. Ctrl-C (SIGINT) is not touched.
"""

import signal
from types import FrameType

import torch

from mocov3_ds.distributed import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Knows whether any rank was asked to stop, from its construction on, in the main thread."""

    def __init__(self) -> None:
        self._is_asked = False
        self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._is_asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._is_asked = True

    def on_any_rank(self) -> bool:
        """Return the same answer on all ranks, which must call together; sends one number."""
        local_answer = torch.tensor(int(self._is_asked), device=ranks.this_device())
        return bool(ranks.all_reduce_max(local_answer))

    def close(self) -> None:
        """Give the signals back to the handlers that they had before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
