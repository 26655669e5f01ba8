"""Files on web servers, which are only read, by way of urllib3.

What a URL says is what is asked for: its query goes with each request, and nothing is escaped
twice. Every method makes one attempt; `retry` makes more.
"""

import base64
import http.client
import re
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mocov3_ds.data.storage.address import find_login
from mocov3_ds.data.storage.retry import (
    CannotList,
    RetryLimits,
    StorageError,
    explain_status,
    store_words,
)
from mocov3_ds.data.storage.span import closed_if_odd, read_span
from mocov3_ds.version import __version__

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_REASON_BYTES = 4096  # of a refusal's body


class HttpRefusal(OSError):  # noqa: N818 - the server is in order
    """An answer with a status that is no success.

    Args:
        status: HTTP status.
        words: What the server says about it.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"status {status}: {words}")
        self.status, self.words = status, words


class HttpStore:
    """A web server; see `stores.Store`.

    Args:
        bucket_url: URL of the server, http(s)://HOST.
        limits: When the server counts as out of reach.

    Raises:
        StorageError: The address or the settings of the environment cannot be used.
    """

    def __init__(self, bucket_url: str, limits: RetryLimits) -> None:
        from urllib3.exceptions import HTTPError

        self.limits, self.has_answered = limits, False
        self.errors: tuple[type[Exception], ...] = (HTTPError, http.client.HTTPException, OSError)
        self._root = bucket_url
        # a compressed answer has other bytes at other places
        self._headers = {
            "Accept-Encoding": "identity",
            "User-Agent": f"mocov3-ds/{__version__}",
        }
        login = find_login(bucket_url)
        if login is not None:
            token = base64.b64encode(":".join(login).encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        try:
            self._pool = _make_pool(bucket_url, limits)
        except (HTTPError, ValueError) as error:
            raise StorageError(f"{bucket_url} cannot be asked: {error}.") from None

    def open_body(self, key: str, start: int, end: int | None, tag: str | None) -> "HttpBody":
        """See `stores.Store`."""
        headers = {"If-Match": tag} if tag else {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        return HttpBody(self._ask("GET", key, headers))

    def file_size(self, key: str) -> int:
        """See `stores.Store`; a refused HEAD has no words, and some servers know only GET."""
        try:
            answer = self._ask("HEAD", key, {})
            answer.release_conn()
            if "Content-Length" in answer.headers:
                return read_span(answer.headers["Content-Length"], None).total
        except HttpRefusal as refusal:
            if refusal.status >= 500 and refusal.status != 501:
                raise
        body = HttpBody(self._ask("GET", key, {}))
        body.close()
        return body.total

    def list_files(self, folder: str) -> Iterator[tuple[str, int]]:
        """See `stores.Store`."""
        raise CannotList(f"{self._root} is a web server, which cannot list its files.")

    def start_upload(self, key: str) -> "HttpUpload":
        """See `stores.Store`."""
        raise StorageError(f"{self._root} is a web server, which is only read from.")

    def remove_file(self, key: str) -> None:
        """See `stores.Store`."""
        raise StorageError(f"{self._root} is a web server, which is only read from.")

    def close(self) -> None:
        """See `stores.Store`."""
        self._pool.clear()

    def explain_error(self, url: str, error: Exception) -> Exception | None:
        """See `stores.Store`."""
        from urllib3.exceptions import HTTPError, LocationValueError

        if isinstance(error, HttpRefusal):
            self.has_answered = self.has_answered or error.status < 500
            remedy = "check user and password (in the URL or ~/.netrc) or the signature of the URL"
            return explain_status(url, error.status, error.words, remedy)
        if isinstance(error, LocationValueError):
            return StorageError(f"{url} is no address that can be asked for.")
        cause = next((arg for arg in error.args if isinstance(arg, ssl.SSLError)), error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return StorageError(
                f"{url}: the server's certificate is not trusted ({cause.verify_message}); the "
                "variable SSL_CERT_FILE names a file of authorities."
            )
        if isinstance(error, HTTPError) and "redirect" in str(error):
            return StorageError(f"{url}: the server sends on and on to other addresses.")
        return None

    def _ask(self, method: str, target: str, headers: dict[str, str]) -> "BaseHTTPResponse":
        from urllib3 import Retry
        from urllib3.exceptions import MaxRetryError

        follow = Retry(total=None, connect=0, read=0, redirect=8, status=0, other=0)
        try:
            answer = self._pool.request(
                method,
                self._root + target,
                headers=self._headers | headers,
                preload_content=False,
                decode_content=False,
                retries=follow,
            )
        except MaxRetryError as error:
            raise (error.reason or error) from None
        if 200 <= answer.status < 300:
            return answer
        complaint = _refusal_words(answer, method)
        answer.close()
        raise HttpRefusal(answer.status, complaint)


class HttpBody:
    """An answer of a web server; see `stores.Body`.

    Args:
        answer: The answer, whose body has not been read.

    Raises:
        OddAnswer: Its headers do not say which bytes it holds.
    """

    def __init__(self, answer: "BaseHTTPResponse") -> None:
        self._raw = answer
        headers = answer.headers
        with closed_if_odd(answer):
            span = read_span(headers.get("Content-Length"), headers.get("Content-Range"))
        self.start, self.end, self.total = span
        tag: str | None = headers.get("ETag")
        self.tag = None if tag is None or tag.startswith("W/") else tag  # a weak one never matches

    def read_some(self, size: int) -> bytes:
        """See `stores.Body`."""
        return self._raw.read1(size)

    def close(self) -> None:
        """See `stores.Body`."""
        self._raw.close()


class HttpUpload:
    """What no web server takes; see `stores.Upload`."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """See `stores.Upload`."""
        raise NotImplementedError

    def finish(self) -> None:
        """See `stores.Upload`."""

    def abandon(self) -> None:
        """See `stores.Upload`."""


def _make_pool(bucket_url: str, limits: RetryLimits) -> "PoolManager":
    """Connections to a server, by way of the proxy of the environment where it names one."""
    from urllib3 import PoolManager, ProxyManager, Timeout

    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:  # a container without a list of authorities
        from botocore.httpsession import get_cert_path

        context.load_verify_locations(get_cert_path(True))
    timeout = Timeout(connect=limits.connect_s, read=limits.stall_s)
    parts = urlsplit(bucket_url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        return ProxyManager(proxy, maxsize=64, timeout=timeout, ssl_context=context)
    return PoolManager(maxsize=64, timeout=timeout, ssl_context=context)


def _refusal_words(answer: "BaseHTTPResponse", method: str) -> str:
    """What a server says about its refusal: an object store in XML, others by a short phrase."""
    text = ""
    if method != "HEAD":
        text = (answer.read1(_REASON_BYTES) or b"").decode(errors="replace")
    reason = re.sub(r"[^\x20-\x7e]", "?", answer.reason or "")[:80]
    return store_words(text) or reason or "no reason given"
