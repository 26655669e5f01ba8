"""Which client serves a URL, once a process."""

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import stores
from mocov3_ds.data.storage.http_store import HttpStore
from mocov3_ds.data.storage.s3 import S3Store


def test_a_url_is_a_store_and_a_key(s3):
    store, key = stores.store_for_url(f"{s3}/folder/a.tar")
    assert isinstance(store, S3Store) and key == "folder/a.tar"
    assert stores.store_for_url(f"{s3}/other")[0] is store
    assert isinstance(stores.store_for_url("http://127.0.0.1:1/x")[0], HttpStore)
    stores.forget_stores()
    assert stores.store_for_url(f"{s3}/other")[0] is not store


def test_urls_that_name_no_store_are_refused():
    with pytest.raises(ValueError, match="unknown scheme; known are s3, gs, az, http, https and"):
        storage.read("ftp://host/x")
    with pytest.raises(ValueError, match="names no bucket"):
        storage.read("s3:///x")
