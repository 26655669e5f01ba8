"""The file system seen from inside: what a test can look at, or fail, before each operation.

Python reports what it is about to do with files as audit events; an exception there ends the
operation before it happens. Together with a wrapped `os.fsync` that is each point at which a kill,
a full disk or a power cut can strike, without a word of it in the program.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
Watch = Callable[[str, tuple[str, ...]], None]

_watch: list[Watch] = []  # one at most; a hook can never be taken out again
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch and event in _EVENTS:
        watch = _watch.pop()  # what it does itself is not watched
        try:
            paths = (str(a) for a in arguments[:2] if isinstance(a, str | bytes | Path))
            watch(event.removeprefix("os."), tuple(paths))
        finally:
            _watch.append(watch)


@contextlib.contextmanager
def watched(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `watch(operation, paths)` before each operation of this process inside the block."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        if _watch:
            watch("fsync", (str(Path(f"/proc/self/fd/{descriptor}").readlink()),))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        _watch.append(watch)
        try:
            yield
        finally:
            _watch.clear()
