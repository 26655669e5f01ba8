"""The S3 server that the tests of the sharder share."""

from collections.abc import Iterator

import pytest

from tests import object_store


@pytest.fixture(scope="session")
def s3_server() -> Iterator[object_store.Server]:
    server = object_store.Server()
    server.start()
    with object_store.environment(server.url):
        object_store.make_bucket("bucket")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: object_store.Server) -> Iterator[str]:
    """URL of a bucket; boto3 finds its server."""
    with object_store.environment(s3_server.url, stall_s=5, first_contact_s=5):
        yield "s3://bucket"
