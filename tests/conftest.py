"""Settings that each test process shares."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from mocov3_ds.distributed import ranks
from tests import object_store

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a slow machine end in time: what it does not come to is skipped, and named."""
    parser.addoption(
        "--begin-until",
        type=float,
        default=float("inf"),
        metavar="TIME",
        help="seconds since 1970 after which no further test is begun: the rest is skipped",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test for which no time is left."""
    if time.time() > item.config.getoption("--begin-until"):
        pytest.skip("no time left (--begin-until)")


@pytest.fixture(autouse=True)
def _launcher_variables_end_with_their_test() -> Iterator[None]:
    """A test that joins a group of one sets them, and a command of a later test would obey them."""
    before = {name: os.environ.get(name) for name in ranks.LAUNCHER_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    return ranks.free_port()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[object_store.Server]:
    """The S3 server that the tests of data path and sharder share."""
    server = object_store.Server()
    server.start()
    with object_store.environment(server.url):
        object_store.make_bucket("bucket")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: object_store.Server) -> Iterator[str]:
    """URL of a bucket; boto3 finds its server."""
    with object_store.environment(s3_server.url, stall_s=120, first_contact_s=120):
        yield "s3://bucket"
