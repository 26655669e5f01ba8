"""Which client talks to the object store of a URL, and what does every client offer?

A client makes single attempts only; `retry` decides how often. To add a scheme, write a class with
the methods of `Store` and name it in `CLIENTS`.

Credentials, regions and endpoints come the standard way of each client: for S3 the AWS_*
variables (AWS_ENDPOINT_URL for a store that is not Amazon's), ~/.aws profiles, instance roles; for
the others GOOGLE_*, AZURE_*; for web servers the URL itself or ~/.netrc.
"""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from mocov3_ds.data.storage.address import LOGINS, Address, hide_secrets, split_url, take_login
from mocov3_ds.data.storage.http_store import HttpStore
from mocov3_ds.data.storage.obstore_stores import ObstoreStore
from mocov3_ds.data.storage.retry import RetriedStore, RetryLimits
from mocov3_ds.data.storage.s3 import S3Store


class Body(Protocol):
    """Bytes of one answer."""

    start: int
    """position of the first one in the file"""
    end: int
    """position behind the last one"""
    total: int
    """bytes of the file"""
    tag: str | None
    """version of the file"""

    def read_some(self, size: int) -> bytes:
        """Return at least one byte and at most `size`; none at the end."""
        ...

    def close(self) -> None:
        """Give the connection back, or drop it when not all bytes were read."""
        ...


class Upload(Protocol):
    """A file on its way into a store; invisible until `finish`."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append bytes and return how many."""
        ...

    def finish(self) -> None:
        """Make the file appear."""
        ...

    def abandon(self) -> None:
        """Drop the file; parts that cannot be deleted stay invisible."""
        ...


class Store(RetriedStore, Protocol):
    """One bucket. Methods make one attempt and raise `errors`; `explain_error` translates them."""

    def open_body(self, key: str, start: int, end: int | None, tag: str | None) -> Body:
        """Ask for the bytes `start` to `end` of a file, of version `tag` where that is given."""
        ...

    def file_size(self, key: str) -> int:
        """Return the bytes of a file."""
        ...

    def list_files(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield names and sizes of the files right inside a folder."""
        ...

    def start_upload(self, key: str) -> Upload:
        """Begin a file."""
        ...

    def remove_file(self, key: str) -> None:
        """Delete a file if it exists."""
        ...

    def close(self) -> None:
        """Drop the connections that wait to be used again."""
        ...


CLIENTS: dict[str, Callable[[str, RetryLimits], Store]] = {
    "s3": S3Store,
    "gs": ObstoreStore,
    "az": ObstoreStore,
    "http": HttpStore,
    "https": HttpStore,
}
"""Client class by the scheme of a URL, called with SCHEME://BUCKET and the limits."""

_stores: dict[tuple[object, ...], Store] = {}
_lock = threading.Lock()


def parse_address(url: str) -> Address:
    """Return the store and the key that a URL names, without asking for anything.

    Raises:
        ValueError: The scheme is unknown, or the URL is no address.
    """
    if url.partition("://")[0] not in CLIENTS:
        raise ValueError(
            f"{hide_secrets(url)}: unknown scheme; known are {', '.join(CLIENTS)} and plain paths."
        )
    return split_url(url)


def store_for_url(url: str) -> tuple[Store, str]:
    """Return the store and the key that a URL names; each store is made once a process.

    Raises:
        ValueError: The scheme is unknown, or the client refuses its settings.
    """
    bucket_url, key = parse_address(take_login(url))
    scheme = bucket_url.partition("://")[0]
    limits = RetryLimits.from_environment()
    with _lock:
        # a client does not survive a fork
        identity = (os.getpid(), bucket_url, limits, os.environ.get(LOGINS))
        if identity not in _stores:
            _stores[identity] = CLIENTS[scheme](bucket_url, limits)
        return _stores[identity], key


def forget_stores() -> None:
    """Drop this process's clients, so that new credentials and endpoints count."""
    with _lock:
        for store in _stores.values():
            store.close()
        _stores.clear()
