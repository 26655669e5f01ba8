"""Open, read and write by URL: a folder of this machine or object storage by the same functions.

    read(url, start, end)     bytes of a range             chunks(url)      blocks, in order
    open_read(url)            a seekable binary file       size(url), exists(url)
    write(url, data)          all at once or not at all    open_write(url)  the same, streamed
    entries(url)              files of a folder            remove(url)

A URL is a path, `file://PATH`, or `SCHEME://BUCKET/KEY` of an object store (s3, gs, az, http,
https; credentials and endpoints as in `stores`). A reader never sees half a file: a written one
appears under its name when it is complete.

A read from a store goes on from the byte it reached, of the same version of the file, after any
failure that may pass: for `patience_s` without progress, with back-off. Silence or a trickle gets a
new connection. What comes is counted against the length that the store announced.
"""

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.retry import (
    Changed,
    Patience,
    Stopped,
    StorageError,
    Truncated,
    patiently,
)
from mocov3_ds.data.storage.stores import Body, Store, store_of

__all__ = [
    "BLOCK", "Changed", "Entry", "Stopped", "StorageError", "Truncated", "Writer", "chunks",
    "entries", "exists", "is_local", "join", "open_read", "open_write", "read", "remove", "size",
    "write",
]  # fmt: skip

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


def is_local(url: str) -> bool:
    """Whether a URL names a file or folder of this machine."""
    return "://" not in url or url.startswith("file://")


def join(url: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{url.rstrip('/')}/{name}"


def read(
    url: str, start: int = 0, end: int | None = None, *, stop: threading.Event | None = None
) -> bytes:
    """Bytes `start` to `end` (exclusive; None = all) of a file.

    Args:
        url: of the file.
        start: first byte.
        end: last byte + 1.
        stop: set it to give up waiting for a store that does not answer.

    Raises:
        FileNotFoundError: there is no such file.
        Truncated: it is shorter than `end`.
        OSError: it cannot be read.
    """
    if is_local(url):  # unbuffered: one copy less
        with _path(url).open("rb", buffering=0) as raw:
            raw.seek(start)
            data = raw.read() if end is None else _read_full(raw, end - start)
    else:
        with _Ranged(url, start, end, stop) as ranged:
            data = _read_rest(ranged) if end is None else _read_full(ranged, end - start)
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
    with open_read(url, start, end) as file:
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
        FileNotFoundError: there is no such file (from a store, at the first read).
        OSError: it cannot be read.
    """
    if not is_local(url):
        return cast(BinaryIO, io.BufferedReader(_Ranged(url, start, end, stop), BLOCK))
    wanted = BLOCK if end is None else end - start
    file = _path(url).open("rb", buffering=min(BLOCK, max(wanted, io.DEFAULT_BUFFER_SIZE)))
    file.seek(start)
    return file


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the store cannot be asked.
    """
    if not is_local(url):
        store, key = store_of(url)
        return patiently(store, url, lambda: store.size(key))
    path = _path(url)
    if not path.is_file():
        raise FileNotFoundError(f"{url} does not exist")
    return path.stat().st_size


def exists(url: str) -> bool:
    """Whether there is such a file.

    Raises:
        OSError: the store cannot be asked.
    """
    try:
        return size(url) >= 0
    except FileNotFoundError:
        return False


def entries(url: str) -> list[Entry]:
    """Complete files right inside a folder, by name; empty where there is no such folder.

    Raises:
        OSError: the store cannot be asked.
    """
    if is_local(url):
        folder = _path(url)
        if not folder.is_dir():
            return []
        found = [
            Entry(item.name, item.stat().st_size)
            for item in os.scandir(folder)
            if item.is_file() and not item.name.endswith(_ASIDE)
        ]
    else:
        store, key = store_of(url)
        listed = patiently(store, url, lambda: list(store.entries(key)))
        found = [Entry(name, count) for name, count in listed]
    return sorted(found, key=lambda entry: entry.name)


def write(url: str, data: bytes) -> None:
    """Make a file of `data` all at once: it has the old content or the new, never a part.

    Raises:
        OSError: it cannot be written.
    """
    with open_write(url) as file:
        file.write(data)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[Writer]:
    """A file to write in order, which appears under its name when the block ends well.

    After an exception inside the block nothing has changed. Memory is bounded whatever the size.
    A process that is killed may leave a file NAME.*.tmp in a local folder, or parts of an upload in
    a store: invisible there, and removed by the usual life-cycle rule for incomplete uploads.

    Raises:
        OSError: it cannot be written.
    """
    with _open_write_local(_path(url)) if is_local(url) else _open_upload(url) as writer:
        yield writer


def remove(url: str) -> None:
    """Delete a file; nothing happens where there is none.

    Raises:
        OSError: it cannot be deleted.
    """
    if is_local(url):
        _path(url).unlink(missing_ok=True)
        return
    store, key = store_of(url)
    with contextlib.suppress(FileNotFoundError):
        patiently(store, url, lambda: store.remove(key))


# ------------------------------------------------------------------------------------ this machine

_ASIDE = ".tmp"


def _path(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


@contextlib.contextmanager
def _open_write_local(path: Path) -> Iterator[Writer]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # other machines may write the same name on a shared file system, with the same process id
    aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}{_ASIDE}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- object storage


@contextlib.contextmanager
def _open_upload(url: str) -> Iterator[Writer]:
    store, key = store_of(url)
    upload = patiently(store, url, lambda: store.upload(key))
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abandon()
        raise


def _read_full(raw: io.RawIOBase, count: int) -> bytes:
    """Exactly `count` bytes, fewer at the end of the file."""
    data = bytearray(count)
    view, at = memoryview(data), 0
    while at < count and (got := raw.readinto(view[at:])):
        at += got
    view.release()
    del data[at:]
    return bytes(data)


def _read_rest(raw: io.RawIOBase) -> bytes:
    """All bytes to the end of the file."""
    buffer, blocks = bytearray(BLOCK), []
    while got := raw.readinto(buffer):
        blocks.append(bytes(memoryview(buffer)[:got]))
    return b"".join(blocks)


class _Ranged(io.RawIOBase):
    """A file of a store; asks again from the byte it reached."""

    def __init__(self, url: str, start: int, end: int | None, stop: threading.Event | None) -> None:
        self._url, self._at, self._end = url, start, end
        self._store: Store
        self._store, self._key = store_of(url)
        self._patience = Patience(self._store, url, stop)
        self._body: Body | None = None
        self._ahead = 0  # bytes of the body before the place where reading goes on
        self._tag: str | None = None
        self._total: int | None = None
        self._waited_s, self._waited_for = 0.0, 0  # of this answer, since the speed was last judged

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._at
        elif whence == os.SEEK_END:
            if self._total is None:
                self._total = size(self._url)
            offset += self._total
        step = offset - self._at
        if self._body is not None and step:
            if 0 < step <= BLOCK and offset < self._body.end:
                self._ahead += step
            else:
                self._drop()
        self._at = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._end is not None and self._at >= self._end:
            self._end = None  # the caller wants more than it announced
        while len(buffer) and (self._total is None or self._at < self._total):
            try:
                data = self._some(len(buffer))
            except self._store.errors as error:
                self._drop()
                self._patience.failed(error)
                continue
            if data:
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
        if self._end is not None and self._total is not None and self._total < self._end:
            raise Truncated(f"{self._url} ends at byte {self._total}, before byte {self._end}")
        return 0

    def _some(self, count: int) -> bytes:
        """Bytes from where reading is; none when this answer had no more and another is needed."""
        if self._body is None:
            self._body = self._store.open(self._key, self._at, self._end, self._tag)
            self._store.answered = True
            self._tag, self._total = self._body.tag, self._body.total
            self._ahead = self._at - self._body.start
            if self._ahead < 0:
                raise ConnectionError(f"the answer begins at byte {self._body.start}")
            self._waited_s, self._waited_for = 0.0, 0
        count = min(count, self._body.end - self._at)
        if not count:
            self._drop()
            return b""
        while self._ahead:
            self._ahead -= len(self._receive(self._body, min(self._ahead, BLOCK)))
        return self._receive(self._body, count)

    def _receive(self, body: Body, count: int) -> bytes:
        """At least one byte of the answer, at a speed worth waiting for."""
        started = time.monotonic()
        data = body.read(count)
        self._waited_s += time.monotonic() - started
        self._waited_for += len(data)
        if not data:
            raise ConnectionError("the answer ended before its announced length")
        self._patience.progressed(len(data))
        counters.count("store_bytes", len(data))
        limits = self._store.limits
        if self._waited_s > limits.stall_s:
            if self._waited_for < limits.low_bytes_s * self._waited_s:
                raise TimeoutError(f"{self._waited_for} bytes in {self._waited_s:.0f} s")
            self._waited_s, self._waited_for = 0.0, 0
        return data

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        self._drop()
        super().close()
