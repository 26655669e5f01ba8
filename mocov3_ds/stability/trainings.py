"""How does a training run as a process of its own, and how does it end when this one is asked to?

Each training has a session of its own, so that Ctrl-C in a terminal reaches this process alone. It
asks its trainings once, by SIGTERM, to save after their step and to leave. What is still there
after `SECONDS_TO_SAVE`, or at a second Ctrl-C, is killed with all processes that it started. If
this process is killed itself, its trainings get SIGTERM as well (on Linux).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import psutil
from tqdm import tqdm

from mocov3_ds.settings.wording import count_noun

SECONDS_TO_SAVE = 120.0
"""time in which a training that is asked to stop must have saved and left"""
_ONE_WISH_S = 1.0
"""signals that come within this time of the first are repeated by a launcher, not by a person"""
_PR_SET_PDEATHSIG = 1

_running: set[subprocess.Popen[bytes]] = set()
"""trainings of this process; all of them are told to stop when it is interrupted"""


def run_to_end(command: Sequence[str], output: int) -> int:
    """Train in a process of its own; an interrupt of this one stops it first.

    Args:
        command: command line of the training.
        output: open file that takes what it prints.

    Returns:
        Its exit status.
    """
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
    )
    try:
        _running.add(process)
        return process.wait()
    except BaseException:
        _stop([process], SECONDS_TO_SAVE)
        raise
    finally:
        _running.discard(process)


def stop_all(seconds: float = SECONDS_TO_SAVE) -> None:
    """Ask every training of this process to save and leave, and wait until all have left.

    Args:
        seconds: time after which those that are still there are killed.
    """
    _stop(list(_running), seconds)


def _die_with(parent: int) -> None:
    """In the new process: SIGTERM when the parent dies, also when it is dead already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    """Ask trainings to leave; kill them and all below them after a time, or when interrupted."""
    if not processes:
        return
    descendants = [child for process in processes for child in _processes_below(process.pid)]
    for process in processes:
        process.terminate()
    tqdm.write(
        f"asked {count_noun(len(processes), 'training')} to save after this step and to leave, "
        f"within {seconds:.0f} s; Ctrl-C again ends at once",
        file=sys.stderr,
    )
    deadline = time.monotonic() + seconds
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(deadline - time.monotonic(), 0))
            # ranks whose launcher has left still save
            psutil.wait_procs(descendants, timeout=max(deadline - time.monotonic(), 0))
    finally:
        for victim in (*processes, *descendants):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        for process in processes:
            process.wait()


def _processes_below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return descendants
    return []


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP interrupt this program as Ctrl-C does; only Ctrl-C does it twice.

    A launcher may repeat a signal, and a group gets it once more than a process, so the second of a
    kind is no second wish, but for a Ctrl-C that comes a second later or more. A signal that is
    ignored already (`nohup`, a job in the background) stays ignored.
    """
    asked_at: list[float] = []

    def interrupt(number: int, _frame: object) -> None:
        now = time.monotonic()
        if not asked_at or (number == signal.SIGINT and now - asked_at[0] >= _ONE_WISH_S):
            asked_at.append(now)
            raise KeyboardInterrupt

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
