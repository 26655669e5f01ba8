"""Which blocks of shards from a store lie on the local disk, for all ranks of a machine?

    FOLDER/ab/abcdef...-17      block 17 of the shard with that sha256

A block is named by content, so a shard that was replaced in its store is never mistaken for the old
one. Blocks appear by rename and are read without locks; the least recently used ones leave when the
folder outgrows its bound. Two ranks that want a block at the same moment both fetch it; the threads
of a rank wait for one another.
"""

import contextlib
import io
import logging
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO, cast

from mocov3_ds.data import storage
from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.atomic import TEMPORARY_SUFFIX, replace_when_whole
from mocov3_ds.data.storage.remote_file import SeekableReader

BLOCK = 4 << 20
"""Bytes of a block: the least that is fetched at a time."""

_ABANDONED_S = 3600  # age of a half-written block whose writer must be gone

_log = logging.getLogger("mocov3_ds")


class Cache:
    """A folder of blocks.

    Args:
        folder: Folder on a local disk; made if it does not exist.
        limit: Bytes that the folder may hold; a few blocks of each rank may exceed it for a moment.
        block: Bytes of a block.

    Raises:
        ValueError: The folder cannot be made, or the limit is below 64 blocks.
    """

    def __init__(self, folder: Path, limit: int, block: int = BLOCK) -> None:
        if limit < 64 * block:
            raise ValueError(
                f"a cache of {limit / 1e9:.3g} GB is too small to be of use; give "
                f"{64 * block / 1e9:.2g} GB at least, or none."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache folder {folder} cannot be made: {error}.") from None
        self.block = block
        self._folder, self._limit = folder, limit
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
            # a sync would cost more than it saves: damage shows in the crc32 of a sample
            with replace_when_whole(path, unique=True, durable=False) as temporary:
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
            blocks = self._list_blocks()
            total = sum(size for _, size, _ in blocks)
            for _, size, path in sorted(blocks):
                if total <= self._limit - self._limit // 8:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size

    def _list_blocks(self) -> list[tuple[float, int, str]]:
        """Time of last use, bytes and path of each block; without those that are being written."""
        blocks = []
        for folder in os.scandir(self._folder):
            for item in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat()
                    age_s = time.time() - status.st_mtime
                    if item.name.endswith(TEMPORARY_SUFFIX) and age_s < _ABANDONED_S:
                        continue
                    blocks.append((status.st_mtime, status.st_size, item.path))
        return blocks


def _read_stored(path: Path, size: int) -> bytes | None:
    """Read a block from the disk; None where it is missing or not `size` bytes long."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if len(data) == size:
            os.utime(path)
            return data
    return None


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
