"""An S3 server of the test session on loopback, in a process of its own.

`tests/fault_proxy.py` is one that fails on purpose, to be put in front of it.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mocov3_ds.data.storage import stores
from mocov3_ds.distributed.ranks import free_port


class Server:
    """moto's S3 server; its objects live in its memory and end with it."""

    def __init__(self) -> None:
        self.port = free_port()
        self._env: dict[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        self._process = subprocess.Popen(
            self.command(), env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, "the S3 server ended at once"
            time.sleep(0.05)
        raise TimeoutError("the S3 server did not start")

    def stop(self) -> None:
        """Kill it, as a machine that fails would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Rclone(Server):
    """rclone's S3 server over a folder: its objects outlive it, ranges answer with status 200."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def command(self) -> list[str]:
        program = str(Path(sys.executable).with_name("rclone"))
        address, sign_in = f"127.0.0.1:{self.port}", "key,secret"
        return [program, "serve", "s3", "--config", os.devnull, "--addr", address,
                "--auth-key", sign_in, str(self._folder)]  # fmt: skip


@contextlib.contextmanager
def environment(endpoint: str, **limits: float) -> Iterator[None]:
    """Point boto3 at an endpoint; `limits` are those of `retry.RetryLimits`, e.g. stall_s=0.5."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    settings |= {f"MOCOV3_STORAGE_{name.upper()}": str(x) for name, x in limits.items()}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    stores.forget_stores()
    try:
        yield
    finally:
        stores.forget_stores()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def make_bucket(name: str) -> None:
    """Make a bucket at the endpoint of the environment."""
    import boto3

    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=name)
    client.close()
