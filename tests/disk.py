"""The file system seen from inside: what a test can look at, or fail, before each operation.

Python reports what it is about to do with files as audit events; an exception there ends the
operation before it happens. Together with a wrapped `os.fsync` that is each point at which a kill,
a full disk or a power cut can strike, without a word of it in the program.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
Observer = Callable[[str, tuple[str, ...]], None]

_observers: list[Observer] = []  # one at most; a hook can never be taken out again
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _observers and event in _EVENTS:
        observer = _observers.pop()  # what it does itself is not observed
        try:
            paths = (str(a) for a in arguments[:2] if isinstance(a, str | bytes | Path))
            observer(event.removeprefix("os."), tuple(paths))
        finally:
            _observers.append(observer)


@contextlib.contextmanager
def watched(observer: Observer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `observer(operation, paths)` before each operation of this process inside the block."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        if _observers:
            observer("fsync", (str(Path(f"/proc/self/fd/{descriptor}").readlink()),))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        _observers.append(observer)
        try:
            yield
        finally:
            _observers.clear()


@contextlib.contextmanager
def largest_file(length: int) -> Iterator[None]:
    """Files of this process may be no longer, those that pytest writes among them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
