"""A web server whose answers a test makes up, and that remembers what it was asked."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Asked(NamedTuple):
    """A request."""

    method: str
    target: str
    headers: dict[str, str]
    """by lower-case name"""


class Answer(NamedTuple):
    """An answer; a length that differs from the body's is sent as it stands, None not at all."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    length: str | None = "of the body"


def file_answer(asked: Asked, data: bytes) -> Answer:
    """What an ordinary server answers to a whole or ranged GET or a HEAD of a file."""
    span = asked.headers.get("range", "").removeprefix("bytes=")
    if asked.method == "HEAD" or not span:
        return Answer(body=data)
    first, _, last = span.partition("-")
    start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
    if start >= len(data):
        return Answer(416)
    ranged = ("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
    return Answer(206, data[start:end], (ranged,))


@contextlib.contextmanager
def serve(answer: Callable[[Asked], Answer]) -> Iterator[tuple[str, list[Asked]]]:
    """Address of a server, host:port, and the list of its requests."""
    asked: list[Asked] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.rfile.read(int(headers.get("content-length", 0)))
            asked.append(Asked(self.command, self.path, headers))
            found = answer(asked[-1])
            self.send_response(found.status)
            for name, value in found.headers:
                self.send_header(name, value)
            length = str(len(found.body)) if found.length == "of the body" else found.length
            if length is not None:
                self.send_header("Content-Length", length)
            if length != str(len(found.body)):
                self.close_connection = True
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
