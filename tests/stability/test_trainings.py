"""A training saves and leaves when its parent is interrupted; the second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mocov3_ds.distributed.processes import has_ended
from mocov3_ds.stability import trainings
from tests.test_train import environment

SAVES = """
import signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])

def save(*_):
    time.sleep(float(sys.argv[2]))  # the step goes on, and then the state is written
    (folder / "saved").write_text("x")
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(folder / "ready").write_text("x")
time.sleep(600)
"""
"""a training that takes a number of seconds to save after SIGTERM"""
PARENT = """
import sys
from mocov3_ds.distributed.processes import has_ended
from mocov3_ds.stability import trainings

with trainings.signals_as_interrupts():
    trainings.run_to_end(sys.argv[1:], sys.stdout.fileno())
"""


@contextlib.contextmanager
def started_parent(folder: Path, seconds: float) -> Iterator["subprocess.Popen[str]"]:
    """A process that has a training, which takes so long to save; nothing is left behind."""
    training = [sys.executable, "-c", SAVES, str(folder), str(seconds)]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *training],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # a test may run in the background, where Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(folder / "ready")
        yield parent
    finally:
        below = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
        for process in (parent, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        parent.wait()
        if parent.stderr:
            parent.stderr.close()


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_lets_the_training_save(tmp_path: Path, number: int) -> None:
    with started_parent(tmp_path, seconds=0.5) as parent:
        parent.send_signal(number)
        parent.send_signal(signal.SIGTERM)  # a launcher repeats it: no second wish
        _, printed = parent.communicate(timeout=120)
    assert "asked 1 training to save after this step and to leave, within 120 s" in printed
    assert printed.rstrip().endswith("KeyboardInterrupt")
    assert (tmp_path / "saved").exists()


def test_the_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    with started_parent(tmp_path, seconds=600) as parent:
        (training,) = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGINT)
        assert parent.stderr is not None
        line = parent.stderr.readline()
        time.sleep(1.1 * trainings._ONE_WISH_S)
        parent.send_signal(signal.SIGINT)
        parent.communicate(timeout=120)
        assert "Ctrl-C again ends at once" in line
        wait_until(lambda: has_ended(training))
    assert not (tmp_path / "saved").exists()


def test_ctrl_c_in_a_terminal_reaches_the_parent_alone(tmp_path: Path) -> None:
    with started_parent(tmp_path, seconds=0) as parent:
        (training,) = psutil.Process(parent.pid).children()
        assert os.getpgid(training.pid) == training.pid != os.getpgid(parent.pid)


def test_a_killed_parent_takes_its_training_along(tmp_path: Path) -> None:
    with started_parent(tmp_path, seconds=0) as parent:
        parent.kill()
        wait_for(tmp_path / "saved")


def test_a_training_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    """With what it started: ranks of a launcher are in sessions of their own."""
    launcher = f"""
import subprocess, sys
sleeper = subprocess.Popen([sys.executable, "-c", {SAVES!r}, {str(tmp_path)!r}, "600"],
                           start_new_session=True)
sleeper.wait()
"""
    statuses: list[int] = []

    def train() -> None:
        statuses.append(trainings.run_to_end([sys.executable, "-c", launcher], 2))

    thread = threading.Thread(target=train)
    thread.start()
    wait_for(tmp_path / "ready")
    (process,) = trainings._running
    (rank,) = psutil.Process(process.pid).children()
    trainings.stop_all(seconds=0.3)
    thread.join(120)
    assert statuses == [-signal.SIGTERM]
    wait_until(lambda: has_ended(rank))
    assert not (tmp_path / "saved").exists()
    trainings.stop_all()  # nothing is left to stop


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with trainings.signals_as_interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
