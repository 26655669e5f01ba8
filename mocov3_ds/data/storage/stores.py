"""Object stores behind one small interface: boto3 for s3://, obstore for gs://, az://, http(s)://.

boto3's bodies cost the least CPU of the clients that know every way to sign in; obstore is one
wheel for the other stores. Both only make single attempts here: patience is `storage`'s.

Credentials, regions and endpoints come the standard way of each client: for S3 the AWS_*
variables (AWS_ENDPOINT_URL for a store that is not Amazon's), ~/.aws profiles, instance roles; for
the others GOOGLE_*, AZURE_*.
"""

import contextlib
import http.client
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from mocov3_ds.data.storage.retry import (
    Changed,
    Fallible,
    Limits,
    StorageError,
    Truncated,
    patiently,
)

if TYPE_CHECKING:
    from obstore import GetOptions

_T = TypeVar("_T")

PART = 16 << 20
"""Bytes of one part of an upload; two are on their way at most."""


class Body(Protocol):
    """Bytes of one answer."""

    start: int
    """place of the first one in the file"""
    end: int
    """place behind the last one"""
    total: int
    """bytes of the file"""
    tag: str | None
    """version of the file"""

    def read(self, size: int) -> bytes:
        """At least one byte and at most `size`; none at the end."""
        ...

    def close(self) -> None:
        """Give the connection back, or drop it when bytes are left."""
        ...


class Upload(Protocol):
    """A file on its way into a store; invisible until `finish`."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append bytes; how many."""
        ...

    def finish(self) -> None:
        """Make it appear."""
        ...

    def abandon(self) -> None:
        """Nothing appears; parts that cannot be deleted stay invisible."""
        ...


class Store(Fallible, Protocol):
    """One bucket. Methods make one attempt and raise `errors`; `problem` explains them."""

    def open(self, key: str, start: int, end: int | None, tag: str | None) -> Body:
        """Ask for a range, of a certain version where `tag` is given."""
        ...

    def size(self, key: str) -> int:
        """Bytes of a file."""
        ...

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """Names and sizes right inside a folder."""
        ...

    def upload(self, key: str) -> Upload:
        """Begin a file."""
        ...

    def remove(self, key: str) -> None:
        """Delete a file if it is there."""
        ...


_stores: dict[tuple[int, str, Limits], Store] = {}
_making = threading.Lock()


def store_of(url: str) -> tuple[Store, str]:
    """Store and key of a URL; stores are made once a process.

    Raises:
        ValueError: the scheme is unknown, or the client refuses its settings.
    """
    parts = urlsplit(url)
    where, key = f"{parts.scheme}://{parts.netloc}", parts.path.lstrip("/")
    limits = Limits.of_environment()
    with _making:
        of_process = (os.getpid(), where, limits)
        if of_process not in _stores:
            _stores[of_process] = _make(parts.scheme, where, parts.netloc, limits)
        return _stores[of_process], key


def _make(scheme: str, where: str, name: str, limits: Limits) -> Store:
    if not name:
        raise ValueError(f"{where} names no bucket; write {scheme}://BUCKET/FOLDER.")
    if scheme == "s3":
        return S3Store(name, limits)
    if scheme in ("gs", "az", "http", "https"):
        return ObjectStore(where, limits)
    raise ValueError(f"{where}: unknown scheme; known are s3, gs, az, http, https and plain paths.")


# ---------------------------------------------------------------------------------------------- S3


class S3Store:
    """A bucket of Amazon S3 or of anything that speaks its protocol."""

    def __init__(self, bucket: str, limits: Limits) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        self.limits, self.answered, self._bucket = limits, False, bucket
        self.errors: tuple[type[Exception], ...] = (
            BotoCoreError,
            ClientError,
            HTTPError,
            http.client.HTTPException,
            OSError,
        )
        options: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": limits.connect_s,
            "read_timeout": limits.stall_s,
            "max_pool_connections": 64,
            "tcp_keepalive": True,
        }
        if any(name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")):
            # other servers often do not know the trailing checksums that Amazon's take
            options["request_checksum_calculation"] = "when_required"
            options["response_checksum_validation"] = "when_required"
        try:
            self._client = boto3.session.Session().client("s3", config=Config(**options))
        except (BotoCoreError, ValueError) as error:
            raise StorageError(f"s3://{bucket}: the AWS settings do not work: {error}.") from None

    def open(self, key: str, start: int, end: int | None, tag: str | None) -> "S3Body":
        """See `Store`."""
        options = {"IfMatch": tag} if tag else {}
        if start or end is not None:
            options["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        return S3Body(self._client.get_object(Bucket=self._bucket, Key=key, **options))

    def size(self, key: str) -> int:
        """See `Store`."""
        return int(self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"])

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `Store`."""
        prefix = f"{folder.rstrip('/')}/" if folder.strip("/") else ""
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
            for item in page.get("Contents", []):
                if item["Key"] != prefix:
                    yield item["Key"].removeprefix(prefix), item["Size"]

    def upload(self, key: str) -> "S3Upload":
        """See `Store`."""
        return S3Upload(self, self._client, self._bucket, key)

    def remove(self, key: str) -> None:
        """See `Store`."""
        self._client.delete_object(Bucket=self._bucket, Key=key)

    def problem(self, url: str, error: Exception) -> Exception | None:
        """See `Store`."""
        from botocore import exceptions

        if isinstance(
            error,
            exceptions.NoCredentialsError
            | exceptions.PartialCredentialsError
            | exceptions.CredentialRetrievalError
            | exceptions.ProfileNotFound
            | exceptions.NoRegionError,
        ):
            return StorageError(
                f"{url}: {str(error).rstrip('.')}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "or AWS_PROFILE (and AWS_ENDPOINT_URL for a store that is not Amazon's)."
            )
        if isinstance(error, exceptions.ParamValidationError):
            return StorageError(f"{url} is not a name that S3 allows: {error}.")
        if not isinstance(error, exceptions.ClientError):
            return None
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        self.answered = self.answered or 0 < status < 500
        if code == "NoSuchBucket":
            return StorageError(
                f"{url}: there is no bucket {self._bucket} at {self._client.meta.endpoint_url}; "
                "create it, or correct the name or AWS_ENDPOINT_URL."
            )
        return _meaning(url, status, f"{code}: {error.response.get('Error', {}).get('Message')}")


class S3Body:
    """An answer of S3."""

    def __init__(self, answer: dict[str, Any]) -> None:
        # urllib3's response: botocore's own wrapper only has reads that wait for all bytes asked
        # for, in which a slow trickle cannot be told from work
        self._raw = answer["Body"]._raw_stream
        length = int(answer["ContentLength"])
        self.start, self.end, self.total = 0, length, length
        if "ContentRange" in answer:  # some servers send it with status 200
            span, _, total = answer["ContentRange"].removeprefix("bytes ").partition("/")
            self.start = int(span.partition("-")[0])
            self.end = self.start + length
            self.total = int(total) if total.isdecimal() else self.end
        self.tag: str | None = answer.get("ETag")

    def read(self, size: int) -> bytes:
        """See `Body`."""
        data: bytes = self._raw.read1(size)
        return data

    def close(self) -> None:
        """See `Body`."""
        self._raw.close()


class S3Upload:
    """A multipart upload; a file smaller than one part is put in one request."""

    def __init__(self, store: S3Store, client: Any, bucket: str, key: str) -> None:
        self._store, self._client = store, client
        self._url, self._where = f"s3://{bucket}/{key}", {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._id: str | None = None
        self._sender: ThreadPoolExecutor | None = None
        self._on_their_way: deque[Future[Any]] = deque()
        self._parts: list[dict[str, Any]] = []
        self._count = self._bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """See `Upload`."""
        self._buffer += data
        self._bytes += len(data)
        while len(self._buffer) >= PART:
            self._send(bytes(self._buffer[:PART]))
            del self._buffer[:PART]
        return len(data)

    def finish(self) -> None:
        """See `Upload`."""
        if self._id is None:
            body = bytes(self._buffer)
            self._try(lambda: self._client.put_object(**self._where, Body=body))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            self._collect(0)
            parts = {"UploadId": self._id, "MultipartUpload": {"Parts": self._parts}}
            self._try(lambda: self._complete(parts))
            self._end()
        there = self._try(lambda: self._client.head_object(**self._where))["ContentLength"]
        if there != self._bytes:
            raise StorageError(f"{self._url}: {self._bytes} bytes were written, {there} arrived.")

    def _try(self, attempt: Callable[[], _T]) -> _T:
        return patiently(self._store, self._url, attempt)

    def _complete(self, parts: dict[str, Any]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(**self._where, **parts)
        except ClientError as error:  # an attempt whose answer was lost had completed it
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise

    def abandon(self) -> None:
        """See `Upload`."""
        if self._id is not None:
            self._end()
            # the first error is on its way to the user; a life-cycle rule removes parts left over
            with contextlib.suppress(*self._store.errors):
                self._client.abort_multipart_upload(**self._where, UploadId=self._id)

    def _send(self, part: bytes) -> None:
        if self._id is None:
            begin = self._client.create_multipart_upload
            self._id = self._try(lambda: begin(**self._where))["UploadId"]
            self._sender = ThreadPoolExecutor(2)
        self._count += 1
        number = self._count

        def send() -> dict[str, Any]:
            answer = self._client.upload_part(
                **self._where, UploadId=self._id, PartNumber=number, Body=part
            )
            return {"ETag": answer["ETag"], "PartNumber": number}

        assert self._sender is not None
        self._collect(1)
        self._on_their_way.append(self._sender.submit(self._try, send))

    def _collect(self, left: int) -> None:
        """Wait until at most `left` parts are on their way."""
        while len(self._on_their_way) > left:
            self._parts.append(self._on_their_way.popleft().result())

    def _end(self) -> None:
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ obstore


class ObjectStore:
    """A bucket or server that obstore reaches."""

    def __init__(self, where: str, limits: Limits) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.limits, self.answered = limits, False
        self.errors: tuple[type[Exception], ...] = (BaseError, OSError)
        stall, connect = timedelta(seconds=limits.stall_s), timedelta(seconds=limits.connect_s)
        try:
            self._store = from_url(
                where,
                client_options={
                    "allow_http": True,
                    "connect_timeout": connect,
                    "read_timeout": stall,
                    "timeout": 3 * stall,  # of one request with its body: ends a trickle
                },
                retry_config={"max_retries": 1, "retry_timeout": stall},
            )
        except Exception as error:
            raise StorageError(f"{where}: the store's settings do not work: {error}.") from None

    def open(self, key: str, start: int, end: int | None, tag: str | None) -> "ObjectBody":
        """See `Store`."""
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
            options.pop("range")  # a server without ranges: take all, skip what is not wanted
            answer = obstore.get(self._store, key, options=options)
        return ObjectBody(answer)

    def size(self, key: str) -> int:
        """See `Store`."""
        import obstore

        return int(obstore.head(self._store, key)["size"])

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `Store`."""
        import obstore

        prefix = f"{folder.rstrip('/')}/" if folder.strip("/") else None
        for item in obstore.list_with_delimiter(self._store, prefix)["objects"]:
            yield item["path"].removeprefix(prefix or ""), item["size"]

    def upload(self, key: str) -> "ObjectUpload":
        """See `Store`."""
        return ObjectUpload(self._store, key)

    def remove(self, key: str) -> None:
        """See `Store`."""
        import obstore

        obstore.delete(self._store, key)

    def problem(self, url: str, error: Exception) -> Exception | None:
        """See `Store`."""
        from obstore import exceptions

        self.answered = self.answered or isinstance(error, FileNotFoundError)
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, exceptions.PreconditionError):
            return Changed(f"{url} changed while it was read")
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return _meaning(url, 403, first_line)
        if "status code: 416" in first_line:
            return Truncated(f"{url} ends before the bytes that were asked for")
        if isinstance(error, exceptions.NotSupportedError | exceptions.InvalidPathError):
            return StorageError(f"{url}: {first_line}.")
        return None


class ObjectBody:
    """An answer that obstore streams."""

    _CHUNK = 256 << 10

    def __init__(self, answer: Any) -> None:
        self.start, self.end = answer.range
        self.total = int(answer.meta["size"])
        self.tag: str | None = answer.meta.get("e_tag")
        self._chunks = iter(answer.stream(min_chunk_size=self._CHUNK))
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """See `Body`."""
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        data, self._left = self._left[:size].tobytes(), self._left[size:]
        return data

    def close(self) -> None:
        """See `Body`."""
        self._chunks = iter(())


class ObjectUpload:
    """A file that obstore sends in parts."""

    def __init__(self, store: Any, key: str) -> None:
        import obstore

        self._writer: Any = obstore.open_writer(store, key, buffer_size=PART, max_concurrency=2)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """See `Upload`."""
        self._writer.write(bytes(data))
        return len(data)

    def finish(self) -> None:
        """See `Upload`."""
        self._writer.close()

    def abandon(self) -> None:
        """See `Upload`."""
        self._writer = None  # dropped without `close`: the parts never become a file


def _meaning(url: str, status: int, text: str) -> Exception | None:
    """What an HTTP status means for good; None where it may pass."""
    if status == 404:
        return FileNotFoundError(f"{url} does not exist")
    if status == 416:
        return Truncated(f"{url} ends before the bytes that were asked for")
    if status == 412:
        return Changed(f"{url} changed while it was read")
    if status in (401, 403):
        return StorageError(
            f"{url}: the store refuses access ({text}); check the credentials and what they may do."
        )
    if 400 <= status < 500 and status not in (408, 425, 429) and "RequestTimeout" not in text:
        return StorageError(f"{url}: the store refuses ({status} {text}).")
    return None
