"""A proxy that fails on purpose, in front of an HTTP object store.

Faults, per answer to a GET of a file that `only` accepts, drawn from a seeded generator:

    503       the store is busy                reset     connection reset amid the body
    truncate  closed amid the body             stall     silence amid the body, until `release`
    trickle   a few bytes at a time            wrong     some bytes of the body are others
    refuse    connection closed before any answer
    early     the bytes before the wanted ones, as a cache with a wrong slice sends them
    nolength  no Content-Length: the end of the connection is the end of the body
    oddrange  a Content-Range that nobody can read
"""

import collections
import http.client
import http.server
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping

KINDS = (
    "503", "reset", "truncate", "stall", "trickle", "wrong", "refuse", "early", "nolength",
    "oddrange",
)  # fmt: skip
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultProxy:
    """Serves `url` until `close`; `injected` counts the faults by kind, `requests` the GETs."""

    def __init__(
        self,
        upstream: str,
        faults: Mapping[str, float],
        *,
        seed: int = 0,
        only: Callable[[str], bool] = lambda path: True,
        limit: int | None = None,
    ) -> None:
        assert set(faults) <= set(KINDS)
        self.faults, self.only, self.limit = dict(faults), only, limit
        self.injected: collections.Counter[str] = collections.Counter()
        self.requests = 0
        self.ranges: list[tuple[str, str]] = []
        self.upstream = upstream.removeprefix("http://")
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.release = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def draw(self, path: str) -> str | None:
        with self._lock:
            self.requests += 1
            if not self.only(path):
                return None
            if self.limit is not None and sum(self.injected.values()) >= self.limit:
                return None
            at = self._random.random()
            for kind, chance in self.faults.items():
                if at < chance:
                    self.injected[kind] += 1
                    return kind
                at -= chance
        return None

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        kind = self.owner.draw(self.path)
        if self.command == "GET":
            self.owner.ranges.append((self.path, self.headers.get("Range", "")))
        if kind == "refuse":
            self._reset()
            return
        if kind == "503":
            body = b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        answer, body = self._forward()
        if kind == "wrong" and body:
            body = bytearray(body)
            for place in range(len(body) // 3, len(body), max(1, len(body) // 5)):
                body[place] ^= 0x40
        headers = {k.title(): v for k, v in answer.getheaders() if k.lower() not in _HOP}
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        headers["Content-Length"] = length or "0"
        if self.command == "GET" and kind is not None:
            body = self._spoil_span(kind, headers, body)
        self.send_response_only(answer.status, answer.reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        if kind in ("reset", "truncate", "stall"):
            self.wfile.write(body[:half])
            self.wfile.flush()
            if kind == "reset":
                self._reset()
            elif kind == "stall":
                self.owner.release.wait()
            self.close_connection = True
        elif kind == "trickle":
            for at in range(0, len(body), 16):
                self.wfile.write(body[at : at + 16])
                if self.owner.release.wait(0.05):
                    break
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_HEAD = do_GET

    def _spoil_span(self, kind: str, headers: dict[str, str], body: bytes) -> bytes:
        """Let headers say less, or something else, of which bytes come."""
        if kind == "nolength":
            del headers["Content-Length"]
            self.close_connection = True
        elif kind == "oddrange":
            headers["Content-Range"] = "bytes of the file"
        elif kind == "early":
            span = re.match(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            if span is not None and int(span[1]):
                begin, end = max(0, int(span[1]) - 100), int(span[1])
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{span[2]}"
                body = bytes(end - begin)
                headers["Content-Length"] = str(len(body))
        return body

    def do_PUT(self) -> None:
        answer, body = self._forward()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT
    do_DELETE = do_PUT

    def _forward(self) -> tuple[http.client.HTTPResponse, bytes]:
        """The store's own answer; a store that is down becomes a closed connection."""
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=240)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            connection.request(self.command, self.path, sent or None, headers)
            answer = connection.getresponse()
            return answer, answer.read()
        except OSError as error:
            raise ConnectionAbortedError from error
        finally:
            connection.close()

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True
