"""End in good order when the machine is taken away: after a step, with a checkpoint.

Slurm (`--signal=USR1@120`), Kubernetes and spot instances send a signal some time before they kill;
a terminal that is closed sends SIGHUP. What launchers make of a signal comes to the same:

    torchrun, accelerate (several ranks)  pass it on to each rank, and kill after 30 s
    deepspeed.launcher.launch             SIGTERM to one rank after the other, each killed after
                                          30 s; a SIGHUP ends it, and no rank is told
    deepspeed, accelerate (one rank)      end, and no rank is told: each sees that they are gone
    a process group, a control group      launcher and ranks get it, and then the launcher repeats
                                          it to the ranks: a repeated signal is no second wish

So a signal after the first changes nothing. SIGINT (Ctrl-C) ends a run at once, and SIGKILL always
does. Before the loop there is nothing to save, and a signal ends the run at once.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch

from mocov3_ds.distributed import heartbeat, ranks

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class AskedToStopError(Exception):
    """The run was asked to stop before its loop, where there is nothing to save."""

    def __init__(self, signal_name: str, status: int) -> None:
        super().__init__(f"asked to stop by {signal_name} before the first step of this start")
        self.status = status
        """exit status that was wished for"""


class Stop(NamedTuple):
    """Why a run is to end after a step."""

    sentence: str
    """without a full stop"""
    launcher_is_lost: bool


class Preemption:
    """Knows whether any rank was asked to stop, from its construction on, in the main thread.

    A SIGHUP that is ignored already (`nohup`) stays ignored.

    Args:
        status: Exit status of a run that is asked to stop before its loop.
    """

    def __init__(self, status: int = 0) -> None:
        self._status, self._asked_by, self._is_in_loop = status, "", False
        self._handlers: dict[signal.Signals, Any] = {}
        # a notebook may train in another thread, where Python lets nobody handle signals
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if in_main_thread else ():
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._asked_by:
            return
        self._asked_by = signal.Signals(number).name
        if not self._is_in_loop:
            raise AskedToStopError(self._asked_by, self._status)

    def enter_loop(self) -> None:
        """Let the run be asked from now on: a signal no longer raises `AskedToStopError`."""
        self._is_in_loop = True

    def find_stop(self) -> Stop | None:
        """Return why the run is to end, on all ranks the same; None = it goes on.

        All ranks must call together. Sends one number, and at the end a sentence.
        """
        sentence_of_loss = heartbeat.lost_launcher()
        is_asked = bool(sentence_of_loss or self._asked_by)
        if ranks.world_size() > 1:
            flag = torch.full((), int(is_asked), device=ranks.this_device())
            is_asked = bool(ranks.all_reduce_max(flag))
        if not is_asked:
            return None
        answers = ranks.gather_objects((sentence_of_loss, self._asked_by))
        for sentence, _ in answers:
            if sentence:
                return Stop(sentence, launcher_is_lost=True)
        name = next(name for _, name in answers if name)
        return Stop(f"asked to stop by {name}", launcher_is_lost=False)

    def close(self) -> None:
        """Give the signals back to the handlers that they had before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def repeated_signals_ignored() -> Iterator[None]:
    """Let no signal of `SIGNALS` cut short what a run that is ending has to say."""
    handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing; a child process does not inherit it, as it would `SIG_IGN`."""
