"""Which blocks of shards from a store lie on the local disk, for all ranks of a machine?

    FOLDER/mocov3-ds-cache/CACHEDIR.TAG             marks the folder as one of this program
    FOLDER/mocov3-ds-cache/ab/abcdef...-17          block 17 of the shard with that sha256

The folder that is named may hold anything else: only what has a name of a block, in the marked
folder below it, is counted and deleted.

A block is named by content, so a shard that was replaced in its store is never mistaken for the old
one. Blocks appear by rename and are read without locks; the least recently used ones leave when the
folder outgrows its bound. Two ranks that want a block at the same moment both fetch it; the threads
of a rank wait for one another.
"""

import contextlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mocov3_ds.data import storage
from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.atomic import (
    ABANDONED_S,
    is_temporary,
    open_new,
    replace_when_whole,
)
from mocov3_ds.data.storage.remote_file import SeekableReader

BLOCK = 4 << 20
"""Bytes of a block: the least that is fetched at a time."""

FOLDER_NAME = "mocov3-ds-cache"
"""Name of the marked folder below the one that is given."""

_TAG_NAME = "CACHEDIR.TAG"  # known to programs that make copies, which leave such folders out
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Blocks of mocov3-ds (--data.cache).\n"
_GROUP = re.compile("[0-9a-f]{2}")
_BLOCK_NAME = re.compile(r"[0-9a-f]{64}-\d+")

_log = logging.getLogger("mocov3_ds")


class Cache:
    """A folder of blocks.

    Args:
        folder: Folder on a local disk, made if it does not exist, that may hold other things.
        limit: Bytes of blocks in it; a few blocks of each rank may exceed it for a moment.
        block: Bytes of a block.

    Raises:
        ValueError: The folder cannot be made, something there has its name, or the limit is below
            64 blocks.
    """

    def __init__(self, folder: Path, limit: int, block: int = BLOCK) -> None:
        if limit < 64 * block:
            raise ValueError(
                f"a cache of {limit / 1e9:.3g} GB is too small to be of use; give "
                f"{64 * block / 1e9:.2g} GB at least, or none."
            )
        self.block = block
        self._folder, self._limit = _mark_folder(folder), limit
        self._unmeasured = limit  # bytes added since the folder was measured; at once at first
        self._tidying = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(64)]  # by hash of the block's path
        self._warned = False

    def open_read(
        self, url: str, start: int, digest: str, size: int, *, stop: threading.Event | None = None
    ) -> BinaryIO:
        """Open a binary file as `storage.open_read` does.

        Args:
            url: URL of the file in its store.
            start: Byte that the file opens at.
            digest: SHA-256 of the file, hexadecimal.
            size: Bytes of the whole file.
            stop: Event that ends the waiting for a store when it is set.
        """
        raw = _CachedFile(self, url, start, digest, size, stop)
        return cast(BinaryIO, io.BufferedReader(raw, storage.BLOCK))

    def forget_range(self, digest: str, start: int, end: int) -> None:
        """Delete the blocks with bytes `start` to `end` of a file: they are wrong."""
        with contextlib.suppress(OSError):  # a cache that fails costs speed alone
            for number in range(start // self.block, -(-end // self.block)):
                self._block_path(digest, number).unlink(missing_ok=True)

    def read_block(
        self, url: str, digest: str, number: int, size: int, stop: threading.Event | None
    ) -> bytes:
        """Return a block, from the disk where it lies there in full, else from the store.

        Args:
            url: URL of the file in its store.
            digest: SHA-256 of the file, hexadecimal.
            number: Number of the block in the file, from 0.
            size: Bytes of the whole file.
            stop: Event that ends the waiting for a store when it is set.

        Raises:
            storage.Truncated: The file is shorter than `size`.
            OSError: The store cannot be read.
        """
        start, end = number * self.block, min((number + 1) * self.block, size)
        path = self._block_path(digest, number)
        data = _read_stored(path, end - start)
        counters.add_count("cache_misses" if data is None else "cache_hits")
        if data is None:
            with self._fetching[hash(path) % len(self._fetching)]:
                data = _read_stored(path, end - start)
                if data is None:
                    data = storage.read(url, start, end, stop=stop)
                    self._store_block(path, data)
        return data

    def _block_path(self, digest: str, number: int) -> Path:
        # a digest may come from a stranger's manifest
        assert len(digest) == 64 and digest.isalnum()
        return self._folder / digest[:2] / f"{digest}-{number}"

    def _store_block(self, path: Path, data: bytes) -> None:
        try:
            self._make_room(len(data))
            path.parent.mkdir(exist_ok=True)
            if path.parent.is_symlink():
                raise OSError(f"{path.parent} is a link, and what lies behind it is not ours")
            # a sync would cost more than it saves: damage shows in the crc32 of a sample
            with replace_when_whole(path, durable=False) as temporary:
                temporary.write_bytes(data)
        except OSError as error:  # a full disk costs speed, not the run
            if not self._warned:
                self._warned = True
                _log.warning("cache %s cannot be written, going on without: %s", path, error)

    def _make_room(self, count: int) -> None:
        """Delete the longest unused blocks if, after some writing, the folder is too large."""
        with self._tidying:
            self._unmeasured += count
            if self._unmeasured < self._limit // 64:
                return
            self._unmeasured = count
            blocks = list(self._list_blocks())
            total = sum(size for _, size, _ in blocks)
            for _, size, path in sorted(blocks):
                if total <= self._limit - self._limit // 8:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size

    def _list_blocks(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, bytes and path of each block, or rest of one whose writer is gone."""
        for group in os.scandir(self._folder):
            if not (_GROUP.fullmatch(group.name) and group.is_dir(follow_symlinks=False)):
                continue
            for item in os.scandir(group.path):
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    name = item.name
                    if is_temporary(name) and time.time() - status.st_mtime > ABANDONED_S:
                        name = name.partition(".")[0]
                    if _BLOCK_NAME.fullmatch(name) and item.is_file(follow_symlinks=False):
                        yield status.st_mtime, status.st_size, item.path


def _mark_folder(parent: Path) -> Path:
    """Return the folder of blocks below another one, made and marked where it is new.

    Raises:
        ValueError: It cannot be made, or what has its name has no mark.
    """
    folder = parent / FOLDER_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_symlink() and not any(folder.iterdir()):
            with contextlib.suppress(FileExistsError), open_new(folder / _TAG_NAME) as file:
                file.write(_TAG)  # another rank may be doing the same: that it exists is the mark
        is_marked = not folder.is_symlink() and (folder / _TAG_NAME).is_file()
    except OSError as error:
        raise ValueError(f"cache folder {folder} cannot be made: {error}.") from None
    if not is_marked:
        raise ValueError(
            f"{folder} is no cache of this program: it holds no {_TAG_NAME}, or is a link; give "
            "another --data.cache."
        )
    earlier = next(parent.glob("[0-9a-f][0-9a-f]/*-*"), None)
    if earlier is not None and _BLOCK_NAME.fullmatch(earlier.name):
        _log.warning(
            "%s holds blocks of an earlier version (%s/%s, ...), which are no longer used and may "
            "be removed", parent, earlier.parent.name, earlier.name[:8],
        )  # fmt: skip
    return folder


def _read_stored(path: Path, size: int) -> bytes | None:
    """Read a block from the disk; None where it is missing or not `size` bytes long."""
    with contextlib.suppress(OSError):
        with io.FileIO(path, opener=_open_block) as file:
            data = file.read()
        if len(data) == size:
            os.utime(path, follow_symlinks=False)
            return data
    return None


def _open_block(path: str, flags: int) -> int:
    """Open a block; a link or a pipe in its place is none."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


class _CachedFile(SeekableReader):
    """A file of a store, read through the cache."""

    def __init__(
        self,
        cache: Cache,
        url: str,
        start: int,
        digest: str,
        size: int,
        stop: threading.Event | None,
    ) -> None:
        super().__init__(start)
        self._cache, self._url = cache, url
        self._digest, self._size, self._stop = digest, size, stop
        self._number, self._data = -1, b""  # the newest block

    def file_size(self) -> int:
        """See `SeekableReader`."""
        return self._size

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._position >= self._size:
            return 0
        number, offset = divmod(self._position, self._cache.block)
        if number != self._number:
            self._data = self._cache.read_block(
                self._url, self._digest, number, self._size, self._stop
            )
            self._number = number
        count = min(len(buffer), len(self._data) - offset)
        buffer[:count] = self._data[offset : offset + count]
        self._position += count
        return count
