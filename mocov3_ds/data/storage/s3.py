"""Files in Amazon S3, or in anything that speaks its protocol, by way of boto3.

boto3's answers cost the least CPU of the clients that know every way to sign in. Every method makes
one attempt (`retry` makes more), except an upload, whose parts are each retried on their own.
"""

import contextlib
import http.client
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mocov3_ds.data.storage.retry import RetryLimits, StorageError, call_with_retry, explain_status
from mocov3_ds.data.storage.span import closed_if_odd, read_span
from mocov3_ds.settings.environment import read_word

_T = TypeVar("_T")
_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")

_log = logging.getLogger("mocov3_ds")

PART_BYTES = 16 << 20
"""Bytes of one part of an upload; two are on their way at most."""


class S3Store:
    """A bucket of Amazon S3 or of anything that speaks its protocol; see `stores.Store`.

    Args:
        bucket_url: URL of the bucket, s3://BUCKET.
        limits: When the store counts as out of reach.

    Raises:
        StorageError: boto3 refuses the settings of the environment.
    """

    def __init__(self, bucket_url: str, limits: RetryLimits) -> None:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        self.limits, self.has_answered, self.part_bytes = limits, False, PART_BYTES
        self.errors: tuple[type[Exception], ...] = (
            BotoCoreError,
            ClientError,
            HTTPError,
            http.client.HTTPException,
            OSError,
            RecursionError,  # botocore's, of a server that redirects for ever
        )
        self._bucket = bucket_url.removeprefix("s3://")
        self._is_signed = True
        try:
            self._connect()
        except (BotoCoreError, ValueError) as error:
            explained = self.explain_error(bucket_url, error)
            complaint = f"{bucket_url}: the AWS settings do not work: {error}."
            raise explained or StorageError(complaint) from None

    def _connect(self) -> None:
        """Make the client, by what the endpoint is and not by where it was named."""
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        session = boto3.session.Session()
        settings = _client_settings(self.limits)
        anonymous = read_word("MOCOV3_STORAGE_ANONYMOUS")
        if anonymous == "1" or (not anonymous and _has_no_credentials(session)):
            self._is_signed = False
            settings["signature_version"] = UNSIGNED
            if not anonymous:
                _log.warning("s3://%s is asked without a signature: no credentials", self._bucket)
        self.client = session.client("s3", config=Config(**settings))
        if not _is_amazon(self.client.meta.endpoint_url):
            # other servers often do not know the trailing checksums that Amazon's take
            profile = session._session.get_scoped_config()
            for name in _CHECKSUMS:
                if name not in profile and f"AWS_{name.upper()}" not in os.environ:
                    settings[name] = "when_required"
            self.client = session.client("s3", config=Config(**settings))
        if read_word("MOCOV3_STORAGE_REQUESTER_PAYS") == "1":
            self.client.meta.events.register("before-call.s3", _promise_to_pay)

    def open_body(self, key: str, start: int, end: int | None, tag: str | None) -> "S3Body":
        """See `stores.Store`."""
        options = {"IfMatch": tag} if tag else {}
        if start or end is not None:
            options["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        return S3Body(self.client.get_object(Bucket=self._bucket, Key=key, **options))

    def file_size(self, key: str) -> int:
        """See `stores.Store`; a refused HEAD cannot say why, so a GET is asked for the reason."""
        from botocore.exceptions import ClientError

        with contextlib.suppress(ClientError):
            answer = self.client.head_object(Bucket=self._bucket, Key=key)
            return read_span(answer.get("ContentLength"), None).total
        body = S3Body(self.client.get_object(Bucket=self._bucket, Key=key))
        body.close()
        return body.total

    def list_files(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `stores.Store`."""
        prefix = folder if folder.endswith("/") or not folder else f"{folder}/"
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
            for item in page.get("Contents", []):
                if item["Key"] != prefix:
                    yield item["Key"].removeprefix(prefix), item["Size"]

    def start_upload(self, key: str) -> "S3Upload":
        """See `stores.Store`."""
        return S3Upload(self, self._bucket, key)

    def remove_file(self, key: str) -> None:
        """See `stores.Store`."""
        self.client.delete_object(Bucket=self._bucket, Key=key)

    def close(self) -> None:
        """See `stores.Store`."""
        self.client.close()

    def explain_error(self, url: str, error: Exception) -> Exception | None:
        """See `stores.Store`."""
        from botocore import exceptions

        if isinstance(
            error,
            exceptions.NoCredentialsError
            | exceptions.PartialCredentialsError
            | exceptions.CredentialRetrievalError
            | exceptions.ProfileNotFound
            | exceptions.NoRegionError,
        ):
            return StorageError(f"{url}: {str(error).rstrip('.')}; {_SIGN_IN}.")
        if isinstance(error, RecursionError):
            return StorageError(f"{url}: the server sends on and on to other addresses.")
        if isinstance(error, exceptions.ParamValidationError):
            return StorageError(f"{url} is not a name that S3 allows: {error}.")
        if not isinstance(error, exceptions.ClientError):
            return None
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        self.has_answered = self.has_answered or 0 < status < 500
        if code == "NoSuchBucket":
            return StorageError(
                f"{url}: there is no bucket {self._bucket} at {self.client.meta.endpoint_url}; "
                "create it, or correct the name or AWS_ENDPOINT_URL."
            )
        message = " ".join(str(error.response.get("Error", {}).get("Message") or "").split())[:300]
        # a proxy's page has neither
        code, message = code or str(status), message or http.client.responses.get(status, "?")
        if status in (401, 403) and not self._is_signed:
            return StorageError(
                f"{url}: the store refuses access without a signature ({code}: {message}); "
                f"{_SIGN_IN}."
            )
        return explain_status(url, status, f"{code}: {message}", _CHECK_RIGHTS)


_SIGN_IN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (and AWS_ENDPOINT_URL for a "
    "store that is not Amazon's), or MOCOV3_STORAGE_ANONYMOUS=1 for a public bucket"
)

_CHECK_RIGHTS = (
    "check the credentials and what they may do (a public bucket: MOCOV3_STORAGE_ANONYMOUS=1; one "
    "whose readers pay: MOCOV3_STORAGE_REQUESTER_PAYS=1)"
)


def _has_no_credentials(session: Any) -> bool:
    """Whether nothing names any; a profile or half a key is a mistake that must be told."""
    named = ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if any(os.environ.get(name) for name in named):
        return False
    return session.get_credentials() is None


def _is_amazon(endpoint_url: str) -> bool:
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _promise_to_pay(params: dict[str, Any], **_: Any) -> None:
    """Let a bucket whose readers pay send what this account pays for."""
    params["headers"]["x-amz-request-payer"] = "requester"


def _client_settings(limits: RetryLimits) -> dict[str, Any]:
    """Arguments of botocore's `Config`."""
    return {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": limits.connect_s,
        "read_timeout": limits.stall_s,
        "max_pool_connections": 64,
        "tcp_keepalive": True,
    }


class S3Body:
    """An answer of S3; see `stores.Body`."""

    def __init__(self, answer: dict[str, Any]) -> None:
        # urllib3's response: botocore's own wrapper only has reads that wait for all bytes asked
        # for, in which a slow trickle cannot be told from work
        self._raw = answer["Body"]._raw_stream
        with closed_if_odd(self._raw):
            span = read_span(answer.get("ContentLength"), answer.get("ContentRange"))
        self.start, self.end, self.total = span
        self.tag: str | None = answer.get("ETag")

    def read_some(self, size: int) -> bytes:
        """See `stores.Body`."""
        return self._raw.read1(size)

    def close(self) -> None:
        """See `stores.Body`."""
        self._raw.close()


class S3Upload:
    """A multipart upload; a file smaller than one part is put in one request."""

    def __init__(self, store: S3Store, bucket: str, key: str) -> None:
        self._store, self._client = store, store.client
        self._url, self._target = f"s3://{bucket}/{key}", {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._sender: ThreadPoolExecutor | None = None
        self._pending: deque[Future[Any]] = deque()  # parts on their way
        self._parts: list[dict[str, Any]] = []  # parts that arrived
        self._part_count = self._byte_count = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """See `stores.Upload`."""
        self._buffer += data
        self._byte_count += len(data)
        size = self._store.part_bytes
        while len(self._buffer) >= size:
            self._send_part(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return len(data)

    def finish(self) -> None:
        """See `stores.Upload`."""
        if self._upload_id is None:
            body = bytes(self._buffer)
            self._retry(lambda: self._client.put_object(**self._target, Body=body))
        else:
            if self._buffer:
                self._send_part(bytes(self._buffer))
            self._collect_parts(pending=0)
            parts = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": self._parts}}
            self._retry(lambda: self._complete(parts))
            self._end_sender()
        size = self._retry(lambda: self._store.file_size(self._target["Key"]))
        if size != self._byte_count:
            raise StorageError(
                f"{self._url}: {self._byte_count} bytes were written, {size} arrived."
            )

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        return call_with_retry(self._store, self._url, attempt)

    def _complete(self, parts: dict[str, Any]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(**self._target, **parts)
        except ClientError as error:  # an attempt whose answer was lost had completed it
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise

    def abandon(self) -> None:
        """See `stores.Upload`."""
        if self._upload_id is not None:
            self._end_sender()
            # the first error is on its way to the user; a life-cycle rule removes other parts
            with contextlib.suppress(*self._store.errors):
                self._client.abort_multipart_upload(**self._target, UploadId=self._upload_id)

    def _send_part(self, part: bytes) -> None:
        if self._upload_id is None:
            begin = self._client.create_multipart_upload
            self._upload_id = self._retry(lambda: begin(**self._target))["UploadId"]
            self._sender = ThreadPoolExecutor(2)
        self._part_count += 1
        number = self._part_count

        def send() -> dict[str, Any]:
            answer = self._client.upload_part(
                **self._target, UploadId=self._upload_id, PartNumber=number, Body=part
            )
            return {"ETag": answer["ETag"], "PartNumber": number}

        assert self._sender is not None
        self._collect_parts(pending=1)
        self._pending.append(self._sender.submit(self._retry, send))

    def _collect_parts(self, pending: int) -> None:
        """Wait until at most `pending` parts are on their way."""
        while len(self._pending) > pending:
            self._parts.append(self._pending.popleft().result())

    def _end_sender(self) -> None:
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)
