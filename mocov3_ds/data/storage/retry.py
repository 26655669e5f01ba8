"""How long may an object store fail? Back-off over minutes, and errors that say what to do.

Every request to a store is made again after a failure that may pass, for as long as
MOCOV3_STORAGE_PATIENCE_S allows without any progress. Failures that no waiting mends (no such file,
no permission, a file that changed) are raised at once, as one sentence.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mocov3_ds.data.storage import counters
from mocov3_ds.data.storage.address import hide_secrets
from mocov3_ds.settings.environment import read_number

_T = TypeVar("_T")
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 20.0
_PROGRESS_BYTES = 64 << 10
"""Bytes after which a store counts as working again."""
_LOGGED_FAILURES = (3, 10, 30, 100)
_ODD_ANSWERS = 5  # in a row, until a store counts as one that always answers so
_XML_WORD = re.compile(r"<(Code|Message)>([^<]{1,200})</\1>")

_log = logging.getLogger("mocov3_ds")


class StorageError(OSError):
    """The store refuses, or has been out of reach for too long; the message says what to do.

    It says nothing about the content of a file, and is no ValueError: no parser may take it for
    damage.
    """


class CannotList(StorageError):  # noqa: N818 - nothing failed
    """The store cannot say which files it has; those whose names are known can be read."""


class OddAnswer(ConnectionError):  # noqa: N818 - what came is the trouble
    """An answer over HTTP that lacks what it must have; it is asked for only a few times more."""


class Truncated(OSError):  # noqa: N818 - it says what the file is
    """A file ends before the bytes that were asked for."""


class Changed(OSError):  # noqa: N818 - it says what happened to the file
    """A file was replaced while it was read."""


class Stopped(OSError):  # noqa: N818 - nothing failed
    """The caller asked to wait no longer."""


_FINAL = FileNotFoundError | PermissionError | StorageError | Truncated | Changed | Stopped
"""Errors that no further attempt can mend."""


@dataclass(frozen=True)
class RetryLimits:
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
    def from_environment(cls) -> "RetryLimits":
        """Read the environment variables; the defaults are minutes.

        Raises:
            ValueError: the value of a variable is not a number.
        """
        patience_s = read_number("MOCOV3_STORAGE_PATIENCE_S")
        return cls(
            patience_s=patience_s,
            first_contact_s=min(patience_s, read_number("MOCOV3_STORAGE_FIRST_CONTACT_S")),
            stall_s=read_number("MOCOV3_STORAGE_STALL_S"),
            low_bytes_s=read_number("MOCOV3_STORAGE_LOW_BYTES_S"),
            connect_s=read_number("MOCOV3_STORAGE_CONNECT_S"),
        )


class RetriedStore(Protocol):
    """What `Retry` has to know of a store."""

    limits: RetryLimits
    """how long a failure may last"""
    has_answered: bool
    """whether the store has ever answered this process"""
    errors: tuple[type[Exception], ...]
    """exception classes that its client raises"""

    def explain_error(self, url: str, error: Exception) -> Exception | None:
        """Translate an error that is final; None where the next attempt may go well."""
        ...


class Retry:
    """Counts the failures in a row of one read or write, and waits after each of them.

    Args:
        store: Object store whose requests fail.
        url: URL of the file, for messages.
        stop: Event that ends the waiting at once when it is set.
    """

    def __init__(self, store: RetriedStore, url: str, stop: threading.Event | None = None) -> None:
        self._store, self._url = store, hide_secrets(url)
        self._stop = stop or threading.Event()
        self._failures = self._odd_answers = self._progress_bytes = 0
        self._first_failure_s = 0.0  # on the monotonic clock

    def note_progress(self, count: int) -> None:
        """Count `count` bytes that came; enough of them end the row of failures."""
        self._progress_bytes += count
        if self._progress_bytes >= _PROGRESS_BYTES:
            self._failures = self._odd_answers = 0

    def check_stop(self) -> None:
        """Check that the caller still wants what is read.

        Raises:
            Stopped: It does not.
        """
        if self._stop.is_set():
            raise Stopped(f"{self._url}: stopped while it was read")

    def wait_after(self, error: Exception) -> None:
        """Count a failure and wait before the next attempt.

        Raises:
            FileNotFoundError: The store says so; likewise `StorageError`, `Truncated`, `Changed`.
            StorageError: There has been no progress for too long.
            Stopped: The caller waits no longer.
        """
        final = self._store.explain_error(self._url, error)
        if final is None and isinstance(error, _FINAL):
            final = error
        if final is not None:
            raise final from (None if final is error else error)
        self._count_failure(error)
        delay_s = min(_FIRST_DELAY_S * 2 ** min(self._failures - 1, 16), _LONGEST_DELAY_S)
        if self._stop.wait(random.uniform(0.5, 1.0) * delay_s):
            raise Stopped(f"{self._url}: stopped while waiting for the store")

    def _count_failure(self, error: Exception) -> None:
        time_s = time.monotonic()
        if not self._failures:
            self._first_failure_s = time_s
        self._failures += 1
        self._progress_bytes = 0
        counters.add_count("store_retries")
        limits = self._store.limits
        limit_s = limits.patience_s if self._store.has_answered else limits.first_contact_s
        text = hide_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
        waited_s = time_s - self._first_failure_s
        self._odd_answers += isinstance(error, OddAnswer)
        if self._odd_answers >= _ODD_ANSWERS:
            raise StorageError(f"{self._url}: {error}.") from error
        if waited_s > limit_s:
            raise StorageError(
                f"{self._url}: no progress for {waited_s:.0f} s in {self._failures} "
                f"attempts, the last one ended with {text}. (MOCOV3_STORAGE_PATIENCE_S and "
                "MOCOV3_STORAGE_FIRST_CONTACT_S set how long is waited.)"
            ) from error
        if self._failures in _LOGGED_FAILURES:
            _log.warning("%s: attempt %d failed: %s", self._url, self._failures, text)


def call_with_retry(
    store: RetriedStore, url: str, attempt: Callable[[], _T], stop: threading.Event | None = None
) -> _T:
    """Call `attempt` until it succeeds and return its result; `Retry` says how long."""
    retry = Retry(store, url, stop)
    while True:
        try:
            result = attempt()
        except store.errors as error:
            retry.wait_after(error)
        else:
            store.has_answered = True
            return result


def explain_status(
    url: str, status: int, text: str, remedy: str = "check the credentials and what they may do"
) -> Exception | None:
    """Translate an HTTP status that is final; None for one that may pass.

    Args:
        url: URL of the file, for messages.
        status: HTTP status of the answer.
        text: The store's own words about the failure.
        remedy: What helps where access is refused.
    """
    if status in (404, 410):
        return FileNotFoundError(f"{url} does not exist")
    if status == 416:
        return Truncated(f"{url} ends before the bytes that were asked for")
    if status == 412:
        return Changed(f"{url} changed while it was read")
    if status in (401, 403):
        return StorageError(f"{url}: the store refuses access ({text}); {remedy}.")
    is_refused = 300 <= status < 500 or status in (501, 505)  # the same request has no better end
    if is_refused and status not in (408, 425, 429) and "RequestTimeout" not in text:
        return StorageError(f"{url}: the store refuses ({status} {text}).")
    return None


def store_words(text: str) -> str:
    """Return what an object store says in the body of a refusal; empty where it says nothing.

    Args:
        text: Body of the answer: XML with a code and a message, or anything else.
    """
    fields = dict(_XML_WORD.findall(text))
    return ": ".join(fields[name].strip() for name in ("Code", "Message") if name in fields)
