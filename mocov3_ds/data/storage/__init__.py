"""How are files opened, read and written by URL, on this machine and in object storage alike?

    read(url, start, end)     bytes of a range             read_blocks(url)  blocks, in order
    open_read(url)            a seekable binary file       file_size(url), exists(url)
    write(url, data)          all at once or not at all    open_write(url)   the same, streamed
    list_files(url)           files of a folder            remove_file(url)

A URL is a path, `file://PATH`, `SCHEME://BUCKET/KEY` of an object store (s3, gs, az; credentials
and endpoints as in `stores`), or that of a web server (http, https), which is only read; `address`
says how they are taken. A reader never sees half a file: a written one appears under its name when
it is complete.

A store that refuses raises `StorageError`, which no parser takes for damage: it is no ValueError.
"""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

from mocov3_ds.data.storage.address import (
    explain_pattern,
    folder_url,
    hide_secrets,
    is_local,
    is_web,
    join_url,
    local_path,
    split_file_url,
    take_login,
)
from mocov3_ds.data.storage.atomic import is_temporary, open_new, replace_when_whole
from mocov3_ds.data.storage.remote_file import BLOCK, RemoteFile
from mocov3_ds.data.storage.retry import (
    CannotList,
    Changed,
    Stopped,
    StorageError,
    Truncated,
    call_with_retry,
)
from mocov3_ds.data.storage.stores import parse_address, store_for_url

__all__ = [
    "BLOCK", "CannotList", "Changed", "FileEntry", "Stopped", "StorageError", "Truncated", "Writer",
    "can_list", "check_writable", "exists", "explain_pattern", "file_size", "folder_url",
    "hide_secrets", "is_local", "is_web", "join_url", "list_files", "local_path", "open_read",
    "open_write", "parse_address", "read", "read_blocks", "remove_file", "split_file_url",
    "take_login", "write",
]  # fmt: skip


@dataclass(frozen=True)
class FileEntry:
    """A file of a folder."""

    name: str
    """name without the folder"""
    size: int
    """bytes"""


class Writer(Protocol):
    """What `open_write` hands out."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append bytes and return how many."""
        ...


def read(
    url: str, start: int = 0, end: int | None = None, *, stop: threading.Event | None = None
) -> bytes:
    """Read the bytes `start` to `end` of a file.

    Args:
        url: URL of the file.
        start: First byte to read.
        end: Byte behind the last one to read; None = up to the end of the file.
        stop: Event that ends the waiting for a store when it is set.

    Raises:
        FileNotFoundError: There is no such file.
        Truncated: The file is shorter than `end`.
        OSError: The file cannot be read.
    """
    if is_local(url):  # unbuffered: one copy less
        with local_path(url).open("rb", buffering=0) as raw:
            raw.seek(start)
            data = raw.read() if end is None else _read_full(raw, end - start)
    else:
        with RemoteFile(url, start, end, stop) as remote:
            data = _read_rest(remote) if end is None else _read_full(remote, end - start)
    if end is not None and len(data) != end - start:
        raise Truncated(f"{hide_secrets(url)} ends at byte {start + len(data)}, before byte {end}")
    return data


def read_blocks(url: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the same bytes as `read` in blocks of at most `BLOCK`, as they arrive.

    Raises:
        FileNotFoundError: There is no such file.
        Truncated: The file is shorter than `end`.
        OSError: The file cannot be read.
    """
    position = start
    with open_read(url, start, end) as file:
        while end is None or position < end:
            block = file.read(BLOCK if end is None else min(BLOCK, end - position))
            if not block:
                break
            position += len(block)
            yield block
    if end is not None and position != end:
        raise Truncated(f"{hide_secrets(url)} ends at byte {position}, before byte {end}")


def open_read(
    url: str, start: int = 0, end: int | None = None, *, stop: threading.Event | None = None
) -> BinaryIO:
    """Open a binary file to read and seek in, for `tarfile` and the like; close it.

    Args:
        url: URL of the file.
        start: Byte it opens at; `tell` and `seek` count from the file's own first byte.
        end: Byte before which reading will end, so that a store need not send more.
        stop: Event that ends the waiting for a store when it is set.

    Raises:
        FileNotFoundError: There is no such file (from a store, at the first read).
        OSError: The file cannot be read.
    """
    if not is_local(url):
        return cast(BinaryIO, io.BufferedReader(RemoteFile(url, start, end, stop), BLOCK))
    count = BLOCK if end is None else end - start
    buffering = min(BLOCK, max(count, io.DEFAULT_BUFFER_SIZE))
    file = local_path(url).open("rb", buffering=buffering)
    file.seek(start)
    return file


def file_size(url: str) -> int:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The store cannot be asked.
    """
    if not is_local(url):
        store, key = store_for_url(url)
        return call_with_retry(store, url, lambda: store.file_size(key))
    path = local_path(url)
    if not path.is_file():
        raise FileNotFoundError(f"{url} does not exist")
    return path.stat().st_size


def exists(url: str) -> bool:
    """Whether there is such a file.

    Raises:
        OSError: The store cannot be asked.
    """
    try:
        return file_size(url) >= 0
    except FileNotFoundError:
        return False


def can_list(url: str) -> bool:
    """Whether `list_files` can say what is in a folder: a web server cannot."""
    return not is_web(url)


def list_files(url: str) -> list[FileEntry]:
    """List the complete files right inside a folder, by name; none where there is no such folder.

    Raises:
        CannotList: It is a folder of a web server.
        OSError: The store cannot be asked.
    """
    if is_local(url):
        folder = local_path(url)
        if not folder.is_dir():
            return []
        files = [
            FileEntry(item.name, item.stat().st_size)
            for item in os.scandir(folder)
            if item.is_file() and not is_temporary(item.name)
        ]
    else:
        store, key = store_for_url(url)
        listing = call_with_retry(store, url, lambda: list(store.list_files(key)))
        files = [FileEntry(name, size) for name, size in listing]
    return sorted(files, key=lambda entry: entry.name)


def check_writable(url: str) -> None:
    """Check that files can be made in a folder before work is spent on them; makes the folder.

    A store is not asked: it would need a file that a stranger could find.

    Raises:
        ValueError: They cannot be; the message says why.
    """
    if is_web(url):
        raise ValueError(f"{hide_secrets(url)} is on a web server, which is only read from.")
    if not is_local(url):
        return
    folder = local_path(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable.{os.getpid()}-{os.urandom(4).hex()}.tmp"
        open_new(trial).close()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{url} cannot be written ({error.strerror}).") from None


def write(url: str, data: bytes) -> None:
    """Make a file of `data` all at once: it has the old content or the new, never a part.

    Raises:
        OSError: The file cannot be written.
    """
    with open_write(url) as file:
        file.write(data)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[Writer]:
    """Open a file to write in order, which appears under its name when the block ends well.

    After an exception inside the block nothing has changed. Memory is bounded whatever the size.
    A process that is killed may leave a file NAME.*.tmp in a local folder, or parts of an upload in
    a store: invisible there, and removed by the usual life-cycle rule for incomplete uploads.

    Raises:
        OSError: The file cannot be written.
    """
    if is_local(url):
        path = local_path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(path) as temporary, temporary.open("wb") as file:
            yield file
    else:
        with _open_upload(url) as upload:
            yield upload


def remove_file(url: str) -> None:
    """Delete a file; nothing happens where there is none.

    Raises:
        OSError: The file cannot be deleted.
    """
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    store, key = store_for_url(url)
    with contextlib.suppress(FileNotFoundError):
        call_with_retry(store, url, lambda: store.remove_file(key))


@contextlib.contextmanager
def _open_upload(url: str) -> Iterator[Writer]:
    store, key = store_for_url(url)
    upload = call_with_retry(store, url, lambda: store.start_upload(key))
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abandon()
        raise


def _read_full(raw: io.RawIOBase, count: int) -> bytes:
    """Read exactly `count` bytes, fewer at the end of the file."""
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count and (received := raw.readinto(view[filled:])):
        filled += received
    view.release()
    del data[filled:]
    return bytes(data)


def _read_rest(raw: io.RawIOBase) -> bytes:
    """Read all bytes to the end of the file."""
    buffer, blocks = bytearray(BLOCK), []
    while received := raw.readinto(buffer):
        blocks.append(bytes(memoryview(buffer)[:received]))
    return b"".join(blocks)
