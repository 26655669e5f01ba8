"""What a rank finds out about processes: its launcher, a stopped peer, its own main thread."""

import contextlib
import os
import socket
import sys
import sysconfig
import threading
from pathlib import Path

import psutil

_LAUNCHERS = {"torchrun", "deepspeed", "accelerate", "accelerate-launch"}
_LAUNCHER_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "accelerate.commands.launch",
}
_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def find_launchers(process: psutil.Process | None = None) -> list[tuple[str, psutil.Process]]:
    """Return name and process of the launchers above a process, nearest first.

    Args:
        process: The process to start from; None = this one.

    Returns:
        An empty list where a shell started the process.
    """
    launchers = []
    with contextlib.suppress(psutil.Error):
        for parent in (process or psutil.Process()).parents():
            command = parent.cmdline()[:4]
            name = next(
                (w for w in command if Path(w).name in _LAUNCHERS or w in _LAUNCHER_MODULES), None
            )
            if name is None:
                break
            launchers.append((f"{Path(name).name} (pid {parent.pid})", parent))
    return launchers


STARTED_BY = tuple(find_launchers())
"""Launchers above this process when this module was imported, nearest first. A rank imports it
before torch, which takes seconds: one that ends in these would otherwise never be missed."""


def has_ended(process: psutil.Process) -> bool:
    """Tell whether a process is gone, or is dead and only waits for its parent to read its status.

    Args:
        process: A process of this machine.
    """
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it is there, but of another user
        return False


def kill_process(host: str, pid: int, born: float) -> None:
    """Kill another process, if it runs on this machine and the number is still that process.

    Args:
        host: Name of the machine that it runs on.
        pid: Number of the process.
        born: Start of the process in seconds, as psutil gives it.
    """
    if host != socket.gethostname() or pid == os.getpid():
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == born:
            process.kill()


def locate_work(identifier: int | None) -> tuple[str, bool]:
    """Find out where the main thread is, and the threads that work for it.

    A backward pass on a device runs in a thread of autograd's own, while the main thread waits for
    it in native code. Threads of Python's, such as those that load data, are not looked at.

    Args:
        identifier: Number of the main thread, its `ident`.

    Returns:
        Its line as `locate_thread` gives it, with those of such threads behind it, and whether one
        of them is in a collective.
    """
    threads = threading.enumerate()
    of_python = {t.ident for t in threads if not isinstance(t, threading._DummyThread)}
    places = [locate_thread(identifier)]
    places += [
        locate_thread(ident)
        for ident in sys._current_frames()
        if ident not in of_python and ident != identifier
    ]
    lines = [line for line, _ in places if line]
    return ", with a thread in ".join(lines), any(waits for _, waits in places)


def locate_thread(identifier: int | None) -> tuple[str, bool]:
    """Find out where a thread of this process is.

    Args:
        identifier: Number of the thread, its `ident`.

    Returns:
        The innermost line that is neither of an installed package nor of Python's own library, as
        "FUNCTION (FILE:LINE)", or an empty text; and whether the thread is in a collective.
    """
    frame = sys._current_frames().get(identifier or 0)
    location, waits = "", False
    while frame is not None:
        path = frame.f_code.co_filename
        waits |= path.endswith(("distributed/ranks.py", "distributed_c10d.py"))
        is_own = not any(folder in path for folder in ("site-packages", "<frozen", _LIBRARY))
        if not location and is_own:
            location = f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})"
        frame = frame.f_back
    return location, waits
