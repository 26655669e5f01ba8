"""Storage and loader against a real object store: Ceph's gateway, not a simulation of S3."""

import threading

import numpy as np
import pytest

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.storage import Changed, FileEntry, StorageError, Truncated, stores
from mocov3_ds.data.storage.retry import call_with_retry
from tests import object_store, radosgw
from tests.data.loading import SIZES, copied, open_loader, run, same
from tests.data.sets import make_set

DATA = np.random.default_rng(0).bytes(12_000_000)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceph")
    try:
        root = radosgw.unpack(folder / "packages")
    except radosgw.Missing as missing:
        pytest.skip(f"no radosgw: {missing}")
    server = radosgw.RadosGateway(root, folder / "cluster")
    try:
        server.start()
        with object_store.environment(server.url, first_contact_s=60):
            store, _ = stores.store_for_url("s3://bucket")
            call_with_retry(
                store, "s3://bucket", lambda: store.client.create_bucket(Bucket="bucket")
            )
            yield server
    finally:
        server.close()


def test_storage(gateway):
    stores.store_for_url("s3://bucket")[0].part_bytes = 5 << 20
    url = "s3://bucket/storage"
    assert storage.list_files(url) == [] and not storage.exists(f"{url}/a")
    for data in (b"", b"small", DATA):
        storage.write(f"{url}/a", data)
        assert storage.read(f"{url}/a") == data and storage.file_size(f"{url}/a") == len(data)
    assert storage.read(f"{url}/a", 5, 7_000_000) == DATA[5:7_000_000]
    assert b"".join(storage.read_blocks(f"{url}/a", 7)) == DATA[7:]
    storage.write(f"{url}/deeper/b", b"1")
    assert storage.list_files(url) == [FileEntry("a", len(DATA))]
    with pytest.raises(Truncated):
        storage.read(f"{url}/a", 0, len(DATA) + 1)
    with pytest.raises(Truncated):
        storage.read(f"{url}/a", len(DATA) + 5, len(DATA) + 10)
    with pytest.raises(FileNotFoundError):
        storage.read(f"{url}/none")
    with pytest.raises(StorageError, match="no bucket nobody"):
        storage.read("s3://nobody/a")
    with pytest.raises(RuntimeError), storage.open_write(f"{url}/a") as out:
        out.write(DATA[::-1])
        raise RuntimeError
    assert storage.read(f"{url}/a", 0, 100) == DATA[:100]
    with pytest.raises(Changed), storage.open_read(f"{url}/a") as file:
        file.read(10)
        storage.write(f"{url}/a", DATA[::-1])
        file.seek(11_000_000)
        file.read(10)
    storage.remove_file(f"{url}/a")
    assert not storage.exists(f"{url}/a")


def test_a_wrong_secret_is_refused_in_a_sentence(gateway, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    stores.forget_stores()
    with pytest.raises(StorageError, match=r"refuses access \(SignatureDoesNotMatch.*check the"):
        storage.read("s3://bucket/a")
    stores.forget_stores()


def test_the_loader_and_a_gateway_killed_amid_it(gateway, tmp_path):
    local = make_set(str(tmp_path / "set"), SIZES)
    make_set("s3://bucket/set", SIZES)
    stored = manifests.load("s3://bucket/set")
    expected = run(local, 1, 16)
    for world_size, threads in ((1, 0), (3, 2), (4, 1)):
        assert same(run(stored, world_size, 8, threads=threads), expected[:8])
    found = []
    with open_loader(stored) as loader:
        for position in range(16):
            if position == 4:
                gateway.stop()
                back = threading.Timer(2.0, gateway.start)
                back.start()
            found.append(copied(next(loader)))
        back.join()
    assert same(found, expected)
    options = {"image_size": 8, "batch": 8, "threads": 2}
    seen = [
        i
        for rank in range(3)
        for _, _, ids in evaluation_batches(stored, rank=rank, world_size=3, **options)
        for i in ids.tolist()
    ]
    assert sorted(seen) == list(range(52))
