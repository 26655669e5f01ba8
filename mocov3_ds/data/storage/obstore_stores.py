"""Files in Google's and Azure's object stores and on web servers, by way of obstore.

obstore is one wheel for all of these. Every method makes one attempt; `retry` makes more.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mocov3_ds.data.storage.retry import (
    Changed,
    RetryLimits,
    StorageError,
    Truncated,
    explain_status,
)

if TYPE_CHECKING:
    from obstore import GetOptions

PART_BYTES = 16 << 20
"""Bytes of one part of an upload; two are on their way at most."""


class ObstoreStore:
    """A bucket or server that obstore reaches; see `stores.Store`.

    Args:
        bucket_url: URL of the bucket or server, e.g. gs://BUCKET or https://HOST.
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
        try:
            self._store = from_url(
                bucket_url,
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
        """See `stores.Store`."""
        import obstore

        return int(obstore.head(self._store, key)["size"])

    def list_files(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `stores.Store`."""
        import obstore

        prefix = f"{folder.rstrip('/')}/" if folder.strip("/") else None
        for item in obstore.list_with_delimiter(self._store, prefix)["objects"]:
            yield item["path"].removeprefix(prefix or ""), item["size"]

    def start_upload(self, key: str) -> "ObstoreUpload":
        """See `stores.Store`."""
        return ObstoreUpload(self._store, key, self.part_bytes)

    def remove_file(self, key: str) -> None:
        """See `stores.Store`."""
        import obstore

        obstore.delete(self._store, key)

    def explain_error(self, url: str, error: Exception) -> Exception | None:
        """See `stores.Store`."""
        from obstore import exceptions

        self.has_answered = self.has_answered or isinstance(error, FileNotFoundError)
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, exceptions.PreconditionError):
            return Changed(f"{url} changed while it was read")
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return explain_status(url, 403, first_line)
        if "status code: 416" in first_line:
            return Truncated(f"{url} ends before the bytes that were asked for")
        if isinstance(error, exceptions.NotSupportedError | exceptions.InvalidPathError):
            return StorageError(f"{url}: {first_line}.")
        return None


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
