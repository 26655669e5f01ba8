"""What a rank finds out about processes: no stranger is killed, launchers and lines are named."""

import _thread
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.processes import (
    find_launchers,
    has_ended,
    kill_process,
    locate_thread,
    locate_work,
)


@pytest.fixture
def child() -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join()


def test_no_other_process_of_the_same_number_is_killed(child: BaseProcess) -> None:
    me = psutil.Process()
    assert child.pid is not None
    born = psutil.Process(child.pid).create_time()
    kill_process(socket.gethostname(), child.pid, born + 1.0)
    kill_process("elsewhere", child.pid, born)
    kill_process(socket.gethostname(), me.pid, me.create_time())
    assert child.is_alive()
    kill_process(socket.gethostname(), child.pid, born)
    child.join(240)
    assert child.exitcode == -9


def test_a_dead_process_has_ended_whether_or_not_its_status_is_read(child: BaseProcess) -> None:
    assert child.pid is not None
    process = psutil.Process(child.pid)
    assert not has_ended(process)
    process.kill()
    deadline = time.monotonic() + 240
    while not has_ended(process):  # a zombie: nobody has waited for it
        assert time.monotonic() < deadline
    assert process.is_running()
    child.join(240)
    assert has_ended(process)


def test_a_launcher_above_a_process_is_named(tmp_path: Path) -> None:
    assert find_launchers() == []
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "import subprocess, sys\n"
        "rank = 'from mocov3_ds.distributed.processes import STARTED_BY; input(); '\n"
        "rank += 'print([name for name, _ in STARTED_BY])'\n"
        "child = subprocess.Popen([sys.executable, '-c', rank], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "input()\n"
        "child.communicate(b'\\n')\n"
    )
    with subprocess.Popen(
        [sys.executable, str(launcher)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        ((name, parent),) = find_launchers(psutil.Process(pid))
        assert name == f"torchrun (pid {process.pid})"
        assert parent.pid == process.pid
        said, _ = process.communicate("\n")
        assert said.splitlines() == [str([name])]


def wait_for(event: threading.Event) -> None:
    event.wait(600)


def test_a_thread_is_located_by_its_own_line() -> None:
    event = threading.Event()
    thread = threading.Thread(target=wait_for, args=(event,))
    thread.start()
    try:
        deadline = time.monotonic() + 240
        while "wait_for (test_processes.py:" not in (location := locate_thread(thread.ident)[0]):
            assert time.monotonic() < deadline, location
    finally:
        event.set()
        thread.join()
    assert locate_thread(None) == ("", False)


def test_a_thread_that_is_not_of_python_is_located_with_the_main_one() -> None:
    """As the thread of autograd that runs a backward pass on a device."""
    event, ends = threading.Event(), threading.Event()

    def work_in_native_thread() -> None:
        wait_for(event)
        ends.set()

    loading = threading.Thread(target=wait_for, args=(event,), name="loads data")
    loading.start()
    _thread.start_new_thread(work_in_native_thread, ())
    try:
        deadline = time.monotonic() + 240
        while "wait_for" not in (location := locate_work(threading.get_ident())[0]):
            assert time.monotonic() < deadline, location
        assert location.count("wait_for (test_processes.py:") == 1
        assert location.startswith("locate_thread (processes.py:")
        assert ", with a thread in wait_for (test_processes.py:" in location
    finally:
        event.set()
        assert ends.wait(240)
        loading.join()


def test_a_collective_is_told_from_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    me, waits = threading.get_ident(), []
    assert locate_thread(me)[1] is False

    def is_first() -> bool:
        waits.append(locate_thread(me)[1])
        return True

    monkeypatch.setattr(ranks, "is_first", is_first)
    ranks.run_on_first(lambda: None)
    assert waits == [True]
