"""What the tests of object stores share: one large file, and another client in place of boto3."""

from collections.abc import Iterator

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import stores
from mocov3_ds.data.storage.obstore_stores import ObstoreStore
from tests import object_store
from tests.data.storage.faults import DATA


@pytest.fixture
def obstore_for_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client of gs:// and az:// in place of boto3."""
    monkeypatch.setitem(stores.CLIENTS, "s3", ObstoreStore)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    stores.forget_stores()
    yield
    stores.forget_stores()


@pytest.fixture(scope="module")
def big(s3_server: object_store.Server) -> str:
    """A file of 3 MB in the store."""
    with object_store.environment(s3_server.url):
        storage.write("s3://bucket/faults/big.tar", DATA)
    return "s3://bucket/faults/big.tar"
