"""Files in Google's and Azure's object stores, by way of obstore.

obstore is one wheel for both. Every method makes one attempt; `retry` makes more.
"""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mocov3_ds.data.storage.retry import (
    Changed,
    RetryLimits,
    StorageError,
    explain_status,
    store_words,
)
from mocov3_ds.settings.environment import read_word

if TYPE_CHECKING:
    from obstore import GetOptions

PART_BYTES = 16 << 20
"""Bytes of one part of an upload; two are on their way at most."""

_STATUS = re.compile(r"status code: (\d{3})([^:\n]*)")


class ObstoreStore:
    """A bucket that obstore reaches; see `stores.Store`.

    Args:
        bucket_url: URL of the bucket, e.g. gs://BUCKET.
        limits: When the store counts as out of reach.

    Raises:
        StorageError: obstore refuses the settings of the environment.
    """

    def __init__(self, bucket_url: str, limits: RetryLimits) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.limits, self.has_answered, self.part_bytes = limits, False, PART_BYTES
        self.errors: tuple[type[Exception], ...] = (BaseError, OSError)
        stall, connect = timedelta(seconds=limits.stall_s), timedelta(seconds=limits.connect_s)
        anonymous = read_word("MOCOV3_STORAGE_ANONYMOUS") == "1"
        try:
            self._store = from_url(
                bucket_url,
                config={"skip_signature": True} if anonymous else None,
                client_options={
                    "allow_http": True,
                    "connect_timeout": connect,
                    "read_timeout": stall,
                    "timeout": 3 * stall,  # of one request with its body: ends a trickle
                },
                retry_config={"max_retries": 1, "retry_timeout": stall},
            )
        except Exception as error:  # whatever the parsers of a dozen settings raise
            raise StorageError(
                f"{bucket_url}: the store's settings do not work: {error}."
            ) from None

    def open_body(self, key: str, start: int, end: int | None, tag: str | None) -> "ObstoreBody":
        """See `stores.Store`."""
        import obstore
        from obstore.exceptions import GenericError, NotSupportedError

        key = _literal_key(key)
        options: GetOptions = {"if_match": tag} if tag else {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        try:
            answer = obstore.get(self._store, key, options=options)
        except (GenericError, NotSupportedError) as error:
            if "non-partial" not in str(error) and "Range request" not in str(error):
                raise
            options.pop("range")  # a server without ranges: take all and skip the beginning
            answer = obstore.get(self._store, key, options=options)
        return ObstoreBody(answer)

    def file_size(self, key: str) -> int:
        """See `stores.Store`; a refused HEAD cannot say why, so a GET is asked for the reason."""
        import obstore
        from obstore.exceptions import BaseError

        key = _literal_key(key)
        try:
            return int(obstore.head(self._store, key)["size"])
        except (BaseError, FileNotFoundError):
            return int(obstore.get(self._store, key).meta["size"])

    def list_files(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `stores.Store`."""
        import obstore

        folder = folder.removesuffix("/")
        prefix = f"{_literal_key(folder)}/" if folder else None
        for item in obstore.list_with_delimiter(self._store, prefix)["objects"]:
            yield item["path"].removeprefix(prefix or ""), item["size"]

    def start_upload(self, key: str) -> "ObstoreUpload":
        """See `stores.Store`."""
        return ObstoreUpload(self._store, _literal_key(key), self.part_bytes)

    def remove_file(self, key: str) -> None:
        """See `stores.Store`."""
        import obstore

        obstore.delete(self._store, _literal_key(key))

    def close(self) -> None:
        """See `stores.Store`; obstore keeps its connections to itself."""

    def explain_error(self, url: str, error: Exception) -> Exception | None:
        """See `stores.Store`."""
        from obstore import exceptions

        if isinstance(error, StorageError):
            return StorageError(f"{url}: {error}")
        lines = str(error).splitlines() or [type(error).__name__]
        status_match = _STATUS.search(str(error))
        complaint = (
            store_words(str(error)) or (status_match and status_match[2].strip()) or lines[0]
        )
        status = int(status_match[1]) if status_match else 0
        self.has_answered = self.has_answered or 0 < status < 500
        if isinstance(error, FileNotFoundError):
            self.has_answered = True
            if "bucket" in complaint.lower() or "container" in complaint.lower():
                return StorageError(f"{url}: the store refuses ({complaint}).")
            return FileNotFoundError(f"{url} does not exist")
        if isinstance(error, exceptions.PreconditionError):
            return Changed(f"{url} changed while it was read")
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return explain_status(url, status or 403, complaint, _CHECK_RIGHTS)
        if isinstance(error, exceptions.NotSupportedError | exceptions.InvalidPathError):
            return StorageError(f"{url}: {lines[0]}.")
        return explain_status(url, status, complaint)


_CHECK_RIGHTS = (
    "check the credentials and what they may do (a public bucket: MOCOV3_STORAGE_ANONYMOUS=1)"
)


def _literal_key(key: str) -> str:
    """Return a key that obstore takes as it is; it would drop the slashes of others.

    Raises:
        StorageError: The key has an empty part.
    """
    if key.startswith("/") or key.endswith("/") or "//" in key:
        raise StorageError(
            "the client of this store reaches no key with // or a slash at its ends."
        )
    return key


class ObstoreBody:
    """An answer that obstore streams; see `stores.Body`."""

    _CHUNK_BYTES = 256 << 10

    def __init__(self, answer: Any) -> None:
        self.start, self.end = answer.range
        self.total = int(answer.meta["size"])
        self.tag: str | None = answer.meta.get("e_tag")
        self._chunks = iter(answer.stream(min_chunk_size=self._CHUNK_BYTES))
        self._unread = memoryview(b"")  # rest of the newest chunk

    def read_some(self, size: int) -> bytes:
        """See `stores.Body`."""
        if not self._unread:
            self._unread = memoryview(next(self._chunks, b""))
        data, self._unread = self._unread[:size].tobytes(), self._unread[size:]
        return data

    def close(self) -> None:
        """See `stores.Body`."""
        self._chunks = iter(())


class ObstoreUpload:
    """A file that obstore sends in parts; see `stores.Upload`."""

    def __init__(self, store: Any, key: str, part_bytes: int) -> None:
        import obstore

        self._writer: Any = obstore.open_writer(
            store, key, buffer_size=part_bytes, max_concurrency=2
        )

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """See `stores.Upload`."""
        self._writer.write(bytes(data))
        return len(data)

    def finish(self) -> None:
        """See `stores.Upload`."""
        self._writer.close()

    def abandon(self) -> None:
        """See `stores.Upload`."""
        self._writer = None  # dropped without `close`: the parts never become a file
