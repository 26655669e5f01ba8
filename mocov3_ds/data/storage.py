"""Open, read and write by URL: a folder of this machine or object storage by the same functions.

    read(url, start, end)     bytes of a range             chunks(url)      blocks, in order
    open_read(url)            a seekable binary file       size(url), exists(url)
    write(url, data)          all at once or not at all    open_write(url)  the same, streamed
    entries(url)              files of a folder            remove(url)

A URL is a path, `file://PATH`, or `SCHEME://BUCKET/KEY` of an object store. A reader never sees
half a file: a written one appears under its name when it is complete.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

BLOCK = 1 << 20
"""Bytes of one read: larger ones fault in fresh pages, smaller ones cost calls."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder."""

    name: str
    """without the folder"""
    size: int
    """bytes"""


class Writer(Protocol):
    """What `open_write` hands out."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append bytes; how many."""
        ...


class Truncated(OSError):  # noqa: N818 - it says what the file is
    """A file ends before the bytes that were asked for."""


def is_local(url: str) -> bool:
    """Whether a URL names a file or folder of this machine."""
    return "://" not in url or url.startswith("file://")


def join(url: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{url.rstrip('/')}/{name}"


def read(
    url: str,
    start: int = 0,
    end: int | None = None,
    *,
    fresh: bool = False,
    stop: threading.Event | None = None,
) -> bytes:
    """Bytes `start` to `end` (exclusive; None = all) of a file.

    Args:
        url: of the file.
        start: first byte.
        end: last byte + 1.
        fresh: from the store itself, past any cache.
        stop: set it to give up waiting for a store that does not answer.

    Raises:
        FileNotFoundError: there is no such file.
        Truncated: it is shorter than `end`.
        OSError: it cannot be read.
    """
    with _path(url).open("rb") as file:
        file.seek(start)
        data = file.read() if end is None else file.read(end - start)
    if end is not None and len(data) != end - start:
        raise Truncated(f"{url} ends at byte {start + len(data)}, before byte {end}")
    return data


def chunks(url: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The same bytes as `read` in blocks of at most `BLOCK`, as they arrive.

    Raises:
        FileNotFoundError: there is no such file.
        Truncated: it is shorter than `end`.
        OSError: it cannot be read.
    """
    at = start
    with _path(url).open("rb") as file:
        file.seek(start)
        while end is None or at < end:
            block = file.read(BLOCK if end is None else min(BLOCK, end - at))
            if not block:
                break
            at += len(block)
            yield block
    if end is not None and at != end:
        raise Truncated(f"{url} ends at byte {at}, before byte {end}")


def open_read(
    url: str, start: int = 0, end: int | None = None, *, stop: threading.Event | None = None
) -> BinaryIO:
    """A binary file to read and seek in, for `tarfile` and the like; close it.

    Args:
        url: of the file.
        start: place it opens at; `tell` and `seek` count from the file's own first byte.
        end: where reading will end, so that a store need not send more.
        stop: set it to give up waiting for a store that does not answer.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    file = _path(url).open("rb", buffering=BLOCK)
    file.seek(start)
    return file


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = _path(url)
    if not path.is_file():
        raise FileNotFoundError(f"{url} does not exist")
    return path.stat().st_size


def exists(url: str) -> bool:
    """Whether there is such a file."""
    return _path(url).is_file()


def entries(url: str) -> list[Entry]:
    """Complete files right inside a folder, by name; empty where there is no such folder."""
    folder = _path(url)
    if not folder.is_dir():
        return []
    found = [
        Entry(item.name, item.stat().st_size)
        for item in os.scandir(folder)
        if item.is_file() and not item.name.endswith(".tmp")
    ]
    return sorted(found, key=lambda entry: entry.name)


def write(url: str, data: bytes) -> None:
    """Make a file of `data` all at once: it has the old content or the new, never a part."""
    with open_write(url) as file:
        file.write(data)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[Writer]:
    """A file to write in order, which appears under its name when the block ends well.

    After an exception inside the block nothing has changed. Memory is bounded whatever the size.
    """
    path = _path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Delete a file; nothing happens where there is none."""
    _path(url).unlink(missing_ok=True)


def _path(url: str) -> Path:
    if not is_local(url):
        raise ValueError(f"{url}: only files of this machine can be opened.")
    return Path(url.removeprefix("file://")).expanduser()
