"""Uploads to S3 and the sentences that its refusals become."""

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import StorageError, stores
from tests import object_store
from tests.data.storage.faults import DATA


def test_uploads_survive_a_busy_store(s3_server, monkeypatch):
    failures = []

    def flaky(real):
        def call(*args, **kwargs):
            if len(failures) % 3 != 2:
                failures.append(1)
                raise ConnectionResetError("mine")
            failures.append(0)
            return real(*args, **kwargs)

        return call

    with object_store.environment(s3_server.url):
        store, _ = stores.store_for_url("s3://bucket/x")
        store.part_bytes = 5 << 20
        for name in ("put_object", "upload_part", "create_multipart_upload"):
            monkeypatch.setattr(store.client, name, flaky(getattr(store.client, name)))
        for data in (DATA, DATA * 4):
            storage.write("s3://bucket/flaky", data)
            assert storage.read("s3://bucket/flaky") == data
    assert sum(failures) >= 6


def test_an_abandoned_upload_leaves_no_parts(s3):
    store, _ = stores.store_for_url(s3 + "/left")
    store.part_bytes = 5 << 20
    with pytest.raises(RuntimeError), storage.open_write(f"{s3}/left") as out:
        out.write(DATA * 4)
        raise RuntimeError
    uploads = store.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert "left" not in [upload["Key"] for upload in uploads]


def test_no_credentials_no_bucket(s3, monkeypatch):
    with pytest.raises(StorageError, match="no bucket nobody at http"):
        storage.read("s3://nobody/x")
    stores.forget_stores()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        storage.read(f"{s3}/x")
    stores.forget_stores()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody"):
        storage.read(f"{s3}/x")


def test_refused_access_says_so(s3):
    from botocore.exceptions import ClientError

    store, _ = stores.store_for_url(s3)
    answer = {"Error": {"Code": "AccessDenied", "Message": "no"}}
    error = ClientError(answer | {"ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")
    assert "refuses access (AccessDenied: no); check" in str(
        store.explain_error("s3://bucket/x", error)
    )
