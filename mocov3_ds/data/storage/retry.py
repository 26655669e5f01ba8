"""How long a store may fail: back-off over minutes, and errors that say what to do."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mocov3_ds.data.storage import counters

_T = TypeVar("_T")
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 20.0
_ENOUGH = 64 << 10  # bytes after which a store counts as working again

_log = logging.getLogger("mocov3_ds")


class StorageError(OSError, ValueError):
    """The store refuses, or has been out of reach for too long; the message says what to do."""


class Truncated(OSError):  # noqa: N818 - it says what the file is
    """A file ends before the bytes that were asked for."""


class Changed(OSError):  # noqa: N818 - it says what happened to the file
    """A file was replaced while it was read."""


class Stopped(OSError):  # noqa: N818 - nothing failed
    """The caller asked to wait no longer."""


@dataclass(frozen=True)
class Limits:
    """When a store counts as out of reach; MOCOV3_STORAGE_PATIENCE_S and so on set each."""

    patience_s: float
    """seconds without progress until a read or write is given up"""
    first_contact_s: float
    """the same for a store that has never answered this process: its name may be mistyped"""
    stall_s: float
    """seconds of silence, or of less than `low_bytes_s`, after which a connection is replaced"""
    low_bytes_s: float
    """bytes a second that are slower than any store"""
    connect_s: float
    """seconds to connect"""

    @classmethod
    def of_environment(cls) -> "Limits":
        """The variables' values, or minutes.

        Raises:
            ValueError: a value is not a number.
        """

        def number(name: str, default: float) -> float:
            name = f"MOCOV3_STORAGE_{name}"
            try:
                return float(os.environ.get(name, default))
            except ValueError:
                raise ValueError(f"{name}={os.environ[name]} is not a number.") from None

        patience = number("PATIENCE_S", 900)
        return cls(
            patience_s=patience,
            first_contact_s=min(patience, number("FIRST_CONTACT_S", 60)),
            stall_s=number("STALL_S", 20),
            low_bytes_s=number("LOW_BYTES_S", 16 << 10),
            connect_s=number("CONNECT_S", 10),
        )


class Fallible(Protocol):
    """What `Patience` has to know of a store."""

    limits: Limits
    answered: bool
    """whether it has ever answered this process"""
    errors: tuple[type[Exception], ...]
    """what its client raises"""

    def problem(self, url: str, error: Exception) -> Exception | None:
        """What an error means for good, or None where the next attempt may go well."""
        ...


class Patience:
    """Failures in a row of one read or write.

    Args:
        store: that fails.
        url: of the file, for messages.
        stop: set it to give up at once.
    """

    def __init__(self, store: Fallible, url: str, stop: threading.Event | None = None) -> None:
        self._store, self._url = store, url
        self._stop = stop or threading.Event()
        self._failures = self._progress = 0
        self._since = 0.0

    def progressed(self, count: int) -> None:
        """Note bytes that came; enough of them end the row of failures."""
        self._progress += count
        if self._progress >= _ENOUGH:
            self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            FileNotFoundError: the store says so; likewise `StorageError`, `Truncated`, `Changed`.
            StorageError: there has been no progress for too long.
            Stopped: the caller waits no longer.
        """
        final = FileNotFoundError | PermissionError | StorageError | Truncated | Changed | Stopped
        meaning = error if isinstance(error, final) else self._store.problem(self._url, error)
        if meaning is not None:
            raise meaning from (None if meaning is error else error)
        now = time.monotonic()
        if not self._failures:
            self._since = now
        self._failures += 1
        counters.count("store_retries")
        self._progress = 0
        limits = self._store.limits
        budget = limits.patience_s if self._store.answered else limits.first_contact_s
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if now - self._since > budget:
            raise StorageError(
                f"{self._url}: no progress for {now - self._since:.0f} s in {self._failures} "
                f"attempts, the last one ended with {text}. (MOCOV3_STORAGE_PATIENCE_S and "
                "MOCOV3_STORAGE_FIRST_CONTACT_S set how long is waited.)"
            ) from error
        if self._failures in (3, 10, 30, 100):
            _log.warning("%s: attempt %d failed: %s", self._url, self._failures, text)
        longest = min(_FIRST_DELAY_S * 2 ** min(self._failures - 1, 16), _LONGEST_DELAY_S)
        if self._stop.wait(random.uniform(0.5, 1.0) * longest):
            raise Stopped(f"{self._url}: stopped while waiting for the store")


def patiently(
    store: Fallible, url: str, attempt: Callable[[], _T], stop: threading.Event | None = None
) -> _T:
    """What an attempt returns, made again as `Patience` says."""
    patience = Patience(store, url, stop)
    while True:
        try:
            result = attempt()
        except store.errors as error:
            patience.failed(error)
        else:
            store.answered = True
            return result
