"""What the tests of object stores share: data, a proxy that fails, a server without ranges."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

import numpy as np

from tests import object_store
from tests.fault_proxy import FaultProxy

DATA = np.random.default_rng(0).bytes(3_000_000)


def behind_faults(server, faults, limit=None, **limits):
    """A fault proxy and an environment that leads to it.

    Only silence and a trickle have to meet a small limit, which a slow machine may meet as well:
    such a test must not count requests.
    """
    proxy = FaultProxy(server.url, faults, limit=limit)
    must_stall = {"stall", "trickle"} & set(faults)
    limits = {"stall_s": 0.5 if must_stall else 120, "low_bytes_s": 100_000} | limits
    return proxy, object_store.environment(proxy.url, **limits)


class WithoutRanges(http.server.BaseHTTPRequestHandler):
    """Answers 200 with the whole file whatever is asked for."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(DATA)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_without_ranges() -> Iterator[str]:
    """Address of a server that knows no ranges, host:port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WithoutRanges)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
