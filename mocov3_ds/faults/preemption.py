"""Leave in good order when the machine is taken away: SIGTERM and SIGUSR1 end the run after a step.

Slurm (`--signal=USR1@120`), Kubernetes and spot instances send one of them some time before they
kill. The first asks: the step is finished, a checkpoint written, the exit status is 0. A second one
ends the process at once. Ctrl-C (SIGINT) is left alone.
"""

import signal
from types import FrameType

import torch

from mocov3_ds.distributed import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Whether any rank was asked to stop; listens from its construction on, in the main thread."""

    def __init__(self) -> None:
        self._asked = False
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True

    def on_any_rank(self) -> bool:
        """The same answer on all ranks, which must call it together; one number is sent."""
        asked = torch.tensor(int(self._asked), device=ranks.this_device())
        return bool(ranks.all_reduce_max(asked))

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
