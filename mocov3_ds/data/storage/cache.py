"""Blocks of shards from a store, kept on the local disk and shared by all ranks of a machine.

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

BLOCK = 4 << 20
"""Bytes of a block: the least that is fetched at a time."""

_ASIDE = ".tmp"
_FORGOTTEN_S = 3600  # age of a half-written block whose writer must be gone

_log = logging.getLogger("mocov3_ds")


class Cache:
    """A folder of blocks.

    Args:
        folder: on a local disk; made if it is not there.
        limit: bytes that it may hold; a few blocks of each rank may be over for a moment.

    Raises:
        ValueError: the folder cannot be made, or the bound is below 64 blocks.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 64 * BLOCK:
            raise ValueError(
                f"a cache of {limit / 1e9:.3g} GB is too small to be of use; give "
                f"{64 * BLOCK / 1e9:.2g} GB at least, or none."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache folder {folder} cannot be made: {error}.") from None
        self._folder, self._limit = folder, limit
        self._unseen = limit  # bytes added since the folder was last measured; at once at first
        self._tidying = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(64)]  # by hash of the block
        self._complained = False

    def open_read(
        self, url: str, start: int, digest: str, size: int, *, stop: threading.Event | None = None
    ) -> BinaryIO:
        """A binary file as `storage.open_read` gives it.

        Args:
            url: of the file.
            start: place it opens at.
            digest: sha256 of the file, hexadecimal.
            size: bytes of the file.
            stop: set it to give up waiting for a store that does not answer.
        """
        raw = _Blocks(self, url, start, digest, size, stop)
        return cast(BinaryIO, io.BufferedReader(raw, storage.BLOCK))

    def forget(self, digest: str, start: int, end: int) -> None:
        """Delete the blocks with bytes `start` to `end` of a file: they are wrong."""
        for number in range(start // BLOCK, -(-end // BLOCK)):
            self._path(digest, number).unlink(missing_ok=True)

    def block(
        self, url: str, digest: str, number: int, size: int, stop: threading.Event | None
    ) -> bytes:
        """A block, from the disk where it is there in full.

        Raises:
            storage.Truncated: the file is shorter than `size`.
            OSError: the store cannot be read.
        """
        start, end = number * BLOCK, min((number + 1) * BLOCK, size)
        path = self._path(digest, number)
        data = self._kept(path, end - start)
        counters.count("cache_misses" if data is None else "cache_hits")
        if data is None:
            with self._fetching[hash(path) % len(self._fetching)]:
                data = self._kept(path, end - start)
                if data is None:
                    data = storage.read(url, start, end, stop=stop)
                    self._keep(path, data)
        return data

    def _kept(self, path: Path, size: int) -> bytes | None:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) == size:
                os.utime(path)
                return data
        return None

    def _path(self, digest: str, number: int) -> Path:
        # a digest may come from a stranger's manifest
        assert len(digest) == 64 and digest.isalnum()
        return self._folder / digest[:2] / f"{digest}-{number}"

    def _keep(self, path: Path, data: bytes) -> None:
        aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}{_ASIDE}")
        try:
            self._make_room(len(data))
            path.parent.mkdir(exist_ok=True)
            aside.write_bytes(data)
            aside.replace(path)
        except OSError as error:  # a full disk costs speed, not the run
            with contextlib.suppress(OSError):
                aside.unlink()
            if not self._complained:
                self._complained = True
                _log.warning("cache %s cannot be written, going on without: %s", path, error)

    def _make_room(self, count: int) -> None:
        """Delete the longest unused blocks if, after some writing, the folder is too large."""
        with self._tidying:
            self._unseen += count
            if self._unseen < self._limit // 64:
                return
            self._unseen = count
            found, total = [], 0
            for folder in os.scandir(self._folder):
                for item in os.scandir(folder) if folder.is_dir() else ():
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat()
                        age = time.time() - status.st_mtime
                        if item.name.endswith(_ASIDE) and age < _FORGOTTEN_S:
                            continue
                        found.append((status.st_mtime, status.st_size, item.path))
                        total += status.st_size
            for _, size, path in sorted(found):
                if total <= self._limit - self._limit // 8:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size


class _Blocks(io.RawIOBase):
    """A file read through the cache."""

    def __init__(
        self,
        cache: Cache,
        url: str,
        start: int,
        digest: str,
        size: int,
        stop: threading.Event | None,
    ) -> None:
        self._cache, self._url, self._at = cache, url, start
        self._digest, self._size, self._stop = digest, size, stop
        self._number, self._data = -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self._size:
            return 0
        number, place = divmod(self._at, BLOCK)
        if number != self._number:
            self._data = self._cache.block(self._url, self._digest, number, self._size, self._stop)
            self._number = number
        count = min(len(buffer), len(self._data) - place)
        buffer[:count] = self._data[place : place + count]
        self._at += count
        return count
