"""How is a file of an object store read so that failures cost time and nothing else?

A reader goes on from the byte it reached, of the same version of the file, after any failure that
may pass (`retry`). Silence or a trickle gets a new connection. What comes is counted against the
length that the store announced.
"""

import io
import os
import threading
import time

from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.address import hide_secrets
from mocov3_ds.data.storage.retry import Retry, Truncated, call_with_retry
from mocov3_ds.data.storage.stores import Body, Store, store_for_url

BLOCK = 1 << 20
"""Bytes of one read: larger ones fault in fresh pages, smaller ones cost calls."""


class SeekableReader(io.RawIOBase):
    """Base of binary files that can be read and sought in; subclasses give `readinto`."""

    def __init__(self, position: int) -> None:
        self._position = position

    def readable(self) -> bool:
        """Whether `read` works: always."""
        return True

    def seekable(self) -> bool:
        """Whether `seek` works: always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move and return the new position; see `io.IOBase.seek`."""
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self.file_size()
        self.move_to(offset)
        return offset

    def move_to(self, position: int) -> None:
        """Let the next read begin at this byte of the file."""
        self._position = position

    def file_size(self) -> int:
        """Return the bytes of the file."""
        raise NotImplementedError


class RemoteFile(SeekableReader):
    """A file of a store; asks again from the byte it reached.

    Args:
        url: URL of the file in an object store.
        start: First byte to read.
        end: Byte before which reading will end; None = at the end of the file.
        stop: Event that ends the waiting for a store when it is set.
    """

    def __init__(self, url: str, start: int, end: int | None, stop: threading.Event | None) -> None:
        super().__init__(start)
        self._url, self._end = url, end
        self._store: Store
        self._store, self._key = store_for_url(url)
        self._retry = Retry(self._store, url, stop)
        self._body: Body | None = None
        self._skip = 0  # bytes of the body before the position where reading goes on
        self._tag: str | None = None
        self._total: int | None = None
        self._waited_s, self._waited_bytes = 0.0, 0  # since the speed was last judged

    def file_size(self) -> int:
        """See `SeekableReader`; asks the store where no answer has told it yet."""
        if self._total is None:
            self._total = call_with_retry(
                self._store, self._url, lambda: self._store.file_size(self._key)
            )
        return self._total

    def move_to(self, position: int) -> None:
        """See `SeekableReader`; a short way forward is read through, any other asks anew."""
        step = position - self._position
        if self._body is not None and step:
            if 0 < step <= BLOCK and position < self._body.end:
                self._skip += step
            else:
                self._drop_body()
        super().move_to(position)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer from the position on and return the count of bytes; 0 at the end."""
        if self._end is not None and self._position >= self._end:
            self._end = None  # the caller wants more than it announced
        while len(buffer) and (self._total is None or self._position < self._total):
            self._retry.check_stop()
            try:
                data = self._read_body(len(buffer))
            except self._store.errors as error:
                self._drop_body()
                self._retry.wait_after(error)
                continue
            if data:
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        if self._end is not None and self._total is not None and self._total < self._end:
            raise Truncated(
                f"{hide_secrets(self._url)} ends at byte {self._total}, before byte {self._end}"
            )
        return 0

    def _read_body(self, count: int) -> bytes:
        """Read at the position; no bytes when this answer is used up and another is needed."""
        if self._body is None:
            self._body = self._store.open_body(self._key, self._position, self._end, self._tag)
            self._store.has_answered = True
            self._tag, self._total = self._body.tag, self._body.total
            self._skip = self._position - self._body.start
            if not self._body.start <= self._position < max(self._body.end, 1):
                if self._position >= self._total:
                    self._drop_body()
                    return b""
                span = f"{self._body.start} to {self._body.end}"
                raise ConnectionError(f"the answer has bytes {span}, without {self._position}")
            self._waited_s, self._waited_bytes = 0.0, 0
        count = min(count, self._body.end - self._position)
        if not count:
            self._drop_body()
            return b""
        while self._skip:
            self._retry.check_stop()
            self._skip -= len(self._receive(self._body, min(self._skip, BLOCK)))
        data = self._receive(self._body, count)
        self._retry.note_progress(len(data))  # what was skipped brings nobody further
        return data

    def _receive(self, body: Body, count: int) -> bytes:
        """Read at least one byte of the answer, at a speed worth waiting for."""
        started = time.monotonic()
        data = body.read_some(count)
        self._waited_s += time.monotonic() - started
        self._waited_bytes += len(data)
        if not data:
            raise ConnectionError("the answer ended before its announced length")
        counters.add_count("store_bytes", len(data))
        limits = self._store.limits
        if self._waited_s > limits.stall_s:
            if self._waited_bytes < limits.low_bytes_s * self._waited_s:
                raise TimeoutError(f"{self._waited_bytes} bytes in {self._waited_s:.0f} s")
            self._waited_s, self._waited_bytes = 0.0, 0
        return data

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        """Give the connection back or drop it."""
        self._drop_body()
        super().close()
