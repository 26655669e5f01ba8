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
    assert "x: odd path." in str(explained(exceptions.InvalidPathError("odd path")))
    assert explained(exceptions.GenericError("connection reset")) is None
    assert not store.has_answered
    assert isinstance(explained(exceptions.GenericError("status code: 416 range")), Truncated)
    assert store.has_answered
    debug = 'Object at location x not found: Error { status: 404,\n body: Some("...")\n}'
    absent = explained(FileNotFoundError(debug))
    assert isinstance(absent, FileNotFoundError) and str(absent) == f"{url} does not exist"
    words = "status code: 404 Not Found: <Error><Code>NoSuchBucket</Code><Message>none</Message>"
    assert "refuses (NoSuchBucket: none)" in str(explained(FileNotFoundError(words)))
    final = explained(exceptions.GenericError("non-2xx status code: 501 Not Implemented: <html>"))
    assert isinstance(final, StorageError) and "refuses (501 Not Implemented)" in str(final)
    assert explained(exceptions.GenericError("non-2xx status code: 503 Busy: <html>")) is None


@pytest.mark.parametrize("key", ["a//b", "/a", "a/"])
@pytest.mark.usefixtures("obstore_for_s3")
def test_a_key_that_the_client_would_change_is_refused(s3, key):
    with pytest.raises(StorageError, match="reaches no key with //"):
        storage.read(f"{s3}/{key}")
