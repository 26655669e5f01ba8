"""The client of gs://, az:// and http://, put in the place of boto3, meets the same faults."""

import pytest
from obstore import exceptions

from mocov3_ds.data import storage
from mocov3_ds.data.storage import Changed, StorageError, Truncated
from mocov3_ds.data.storage.obstore_stores import ObstoreStore
from mocov3_ds.data.storage.retry import RetryLimits
from tests.data.storage.faults import DATA, behind_faults


@pytest.mark.parametrize("kind", ["503", "reset", "truncate", "stall", "trickle", "refuse"])
@pytest.mark.usefixtures("obstore_for_s3")
def test_the_other_client_survives_it_too(s3_server, big, kind):
    proxy, environment = behind_faults(s3_server, {kind: 1.0}, limit=3)
    with proxy, environment:
        assert storage.read(big) == DATA
        assert storage.read(big, 5, 2_000_000) == DATA[5:2_000_000]
        assert proxy.injected[kind] == 3


def test_refusals_become_sentences():
    limits = RetryLimits(patience_s=1, first_contact_s=1, stall_s=1, low_bytes_s=1, connect_s=1)
    store = ObstoreStore("http://127.0.0.1:1", limits)
    url = "gs://bucket/x"

    def explained(error):
        return store.explain_error(url, error)

    assert isinstance(explained(exceptions.PreconditionError("etag")), Changed)
    denied = explained(exceptions.PermissionDeniedError("no entry"))
    assert isinstance(denied, StorageError) and "refuses access (no entry); check" in str(denied)
    assert isinstance(explained(exceptions.GenericError("status code: 416 range")), Truncated)
    assert "x: odd path." in str(explained(exceptions.InvalidPathError("odd path")))
    assert explained(exceptions.GenericError("connection reset")) is None
    assert not store.has_answered
    assert explained(FileNotFoundError("x")) is None and store.has_answered
