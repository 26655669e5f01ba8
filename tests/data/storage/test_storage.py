"""Storage: one behaviour on a folder and on stores, and every fault that a store can have."""

import hashlib
import http.server
import os
import tarfile
import threading
import time

import numpy as np
import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import Changed, Entry, Stopped, Truncated, stores
from mocov3_ds.data.storage.retry import Limits, Patience, StorageError, patiently
from tests import object_store
from tests.data.sets import make_tar
from tests.fault_proxy import FaultProxy

DATA = np.random.default_rng(0).bytes(3_000_000)


def obstore_for_all(scheme, where, name, limits):
    """The client of gs:// and az:// in place of boto3."""
    return stores.ObjectStore(where, limits)


@pytest.fixture(params=["folder", "s3", "obstore"])
def url(request, tmp_path, monkeypatch):
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "folder":
        return str(tmp_path / "deep" / "folder")
    bucket = request.getfixturevalue("s3")
    if request.param == "obstore":
        monkeypatch.setattr(stores, "_make", obstore_for_all)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    return f"{bucket}/{request.node.name.replace('[', '-').strip(']')}"


def test_what_is_written_is_read(url):
    file = storage.join(url, "a.bin")
    assert not storage.exists(file)
    storage.write(file, DATA)
    assert storage.exists(file) and storage.size(file) == len(DATA)
    assert storage.read(file) == DATA
    assert storage.read(file, 5, 1_500_000) == DATA[5:1_500_000]
    assert storage.read(file, 2_999_999) == DATA[-1:]
    assert b"".join(storage.chunks(file)) == DATA
    assert b"".join(storage.chunks(file, 7, 2_000_000)) == DATA[7:2_000_000]
    assert max(map(len, storage.chunks(file))) <= storage.BLOCK
    storage.write(file, b"other")
    assert storage.read(file) == b"other"
    storage.write(file, b"")
    assert storage.read(file) == b"" and storage.size(file) == 0
    storage.remove(file)
    storage.remove(file)
    assert not storage.exists(file)


def test_seeking(url):
    file = storage.join(url, "seek.bin")
    storage.write(file, DATA)
    rng = np.random.default_rng(1)
    with storage.open_read(file, 100, 2_000_000) as opened:
        assert opened.tell() == 100
        at = 100
        for _ in range(30):
            if rng.random() < 0.7:
                at = int(rng.integers(0, len(DATA)))
                opened.seek(at)
            count = int(rng.integers(0, 300_000))
            found = opened.read(count)
            assert found == DATA[at : at + count]
            at += len(found)
            assert opened.tell() == at
        opened.seek(-3, os.SEEK_END)
        assert opened.read() == DATA[-3:]


def test_tarfile_reads_it(url):
    members = [(f"{i}.jpg", DATA[i * 1000 : i * 2500]) for i in range(1, 40)]
    storage.write(storage.join(url, "a.tar"), make_tar(members)[0])
    for mode in ("r:", "r|"):
        with (
            storage.open_read(storage.join(url, "a.tar")) as file,
            tarfile.open(fileobj=file, mode=mode) as tar,
        ):
            assert [(m.name, tar.extractfile(m).read()) for m in tar] == members


def test_entries_are_the_files_right_inside(url):
    assert storage.entries(url) == []
    for name in ("b.tar", "a.tar", "deeper/c.tar"):
        storage.write(storage.join(url, name), b"12345")
    storage.write(f"{url}-beside/d.tar", b"1")
    assert storage.entries(url) == [Entry("a.tar", 5), Entry("b.tar", 5)]
    assert storage.entries(url + "/") == storage.entries(url)


def test_streamed_writes_are_all_or_nothing(url, monkeypatch):
    monkeypatch.setattr(stores, "PART", 5 << 20)
    file, data = storage.join(url, "long.bin"), DATA * 5
    storage.write(file, b"old")
    with pytest.raises(RuntimeError, match="mine"), storage.open_write(file) as out:
        out.write(data)
        raise RuntimeError("mine")
    assert storage.read(file) == b"old"
    with storage.open_write(file) as out:
        for at in range(0, len(data), 777_777):
            assert out.write(memoryview(data)[at : at + 777_777]) > 0
        assert storage.read(file) == b"old"
    assert hashlib.sha256(storage.read(file)).digest() == hashlib.sha256(data).digest()
    assert storage.entries(url) == [Entry("long.bin", len(data))]


def test_what_is_not_there_and_what_is_too_short(url):
    file = storage.join(url, "short.bin")
    with pytest.raises(FileNotFoundError):
        storage.read(file)
    with pytest.raises(FileNotFoundError):
        storage.size(file)
    storage.write(file, b"12345")
    with pytest.raises(Truncated, match=r"short\.bin"):
        storage.read(file, 2, 6)
    with pytest.raises(Truncated, match=r"short\.bin"):
        storage.read(file, 20, 30)
    with pytest.raises(Truncated, match=r"short\.bin"):
        list(storage.chunks(file, 0, 6))


def test_a_file_url_is_a_path(tmp_path):
    storage.write(f"file://{tmp_path}/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1" and storage.is_local(f"file://{tmp_path}")
    assert not storage.is_local("s3://bucket")


# --------------------------------------------------------------------------------- what goes wrong


@pytest.fixture(scope="module")
def big(s3_server):
    """A file of 3 MB in the store."""
    with object_store.environment(s3_server.url):
        storage.write("s3://bucket/faults/big.tar", DATA)
    return "s3://bucket/faults/big.tar"


def behind(server, faults, limit=None, **limits):
    """A fault proxy and an environment that leads to it."""
    proxy = FaultProxy(server.url, faults, limit=limit)
    limits = {"stall_s": 0.5, "low_bytes_s": 100_000} | limits
    return proxy, object_store.environment(proxy.url, **limits)


@pytest.mark.parametrize("kind", ["503", "reset", "truncate", "stall", "trickle", "refuse"])
def test_a_fault_that_passes_is_survived(s3_server, big, kind):
    proxy, environment = behind(s3_server, {kind: 1.0}, limit=2)
    with proxy, environment:
        assert storage.read(big) == DATA
        assert proxy.injected[kind] == 2


@pytest.mark.parametrize("kind", ["503", "reset", "truncate", "stall", "trickle", "refuse"])
def test_the_other_client_survives_it_too(s3_server, big, kind, monkeypatch):
    monkeypatch.setattr(stores, "_make", obstore_for_all)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    proxy, environment = behind(s3_server, {kind: 1.0}, limit=3)
    with proxy, environment:
        assert storage.read(big) == DATA
        assert storage.read(big, 5, 2_000_000) == DATA[5:2_000_000]
        assert proxy.injected[kind] == 3


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_reading_goes_on_from_the_byte_reached(s3_server, big, kind):
    proxy, environment = behind(s3_server, {kind: 1.0}, limit=1, stall_s=2.0)
    with proxy, environment:
        assert storage.read(big, 1000, 2_900_000) == DATA[1000:2_900_000]
        first, second = (span for _, span in proxy.ranges)
    assert first == "bytes=1000-2899999"
    begin = int(second.removeprefix("bytes=").split("-")[0])
    assert 1000 < begin <= 1_450_500 and second.endswith("-2899999")


@pytest.mark.parametrize("kind", ["503", "trickle", "stall", "refuse"])
def test_a_fault_for_good_ends_in_bounded_time_with_a_sentence(s3_server, big, kind):
    proxy, environment = behind(
        s3_server, {kind: 1.0}, stall_s=0.2, low_bytes_s=1e9, patience_s=1.5
    )
    with proxy, environment:
        if kind == "stall":  # half of what is asked for would come each time
            proxy.faults = {"stall": 0.0, "refuse": 1.0}
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"big\.tar: no progress for \d+ s in \d+ attempts"):
            storage.read(big)
        assert time.monotonic() - started < 30


def test_a_store_that_never_answered_is_given_up_sooner():
    limits = {"patience_s": 600, "first_contact_s": 0.3}
    nobody = f"http://127.0.0.1:{object_store.free_port()}"
    with (
        object_store.environment(nobody, **limits),
        pytest.raises(StorageError, match="no progress"),
    ):
        storage.read("s3://bucket/x")


def test_a_stopped_reader_gives_up_at_once(s3_server, big):
    proxy, environment = behind(s3_server, {"503": 1.0}, patience_s=600)
    stop = threading.Event()
    timer = threading.Timer(0.5, stop.set)
    with proxy, environment:
        timer.start()
        with pytest.raises(Stopped):
            storage.read(big, stop=stop)
    timer.join()


def test_a_server_that_comes_back_is_waited_for():
    server = object_store.Server()
    server.start()
    with object_store.environment(server.url, stall_s=2):
        object_store.make_bucket("bucket")
        storage.write("s3://bucket/a", DATA)
        server.stop()
        back = threading.Timer(1.0, server.start)
        back.start()
        # moto forgets its files: what is seen is that the outage itself raises nothing
        with pytest.raises(StorageError, match="no bucket"):
            storage.read("s3://bucket/a")
        back.join()
    server.stop()


def test_a_file_replaced_while_it_is_read_is_noticed(s3):
    storage.write(f"{s3}/changing", DATA)
    with storage.open_read(f"{s3}/changing") as file:
        file.read(10)
        storage.write(f"{s3}/changing", DATA[::-1])
        with pytest.raises(Changed, match="changed while it was read"):
            file.seek(2_900_000)
            file.read(10)


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


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_server_without_ranges_is_read_all_the_same(scheme):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WithoutRanges)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    address = f"127.0.0.1:{server.server_address[1]}"
    where = "s3://bucket" if scheme == "s3" else f"http://{address}"
    with object_store.environment(f"http://{address}", first_contact_s=5):
        assert storage.read(f"{where}/x", 2_000_000, 2_000_100) == DATA[2_000_000:2_000_100]
        assert storage.read(f"{where}/x") == DATA
    server.shutdown()
    server.server_close()
    thread.join()


def test_uploads_survive_a_busy_store(s3_server, monkeypatch):
    monkeypatch.setattr(stores, "PART", 5 << 20)
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
        store, _ = stores.store_of("s3://bucket/x")
        for name in ("put_object", "upload_part", "create_multipart_upload"):
            monkeypatch.setattr(store._client, name, flaky(getattr(store._client, name)))
        for data in (DATA, DATA * 4):
            storage.write("s3://bucket/flaky", data)
            assert storage.read("s3://bucket/flaky") == data
    assert sum(failures) >= 6


def test_an_abandoned_upload_leaves_no_parts(s3, monkeypatch):
    monkeypatch.setattr(stores, "PART", 5 << 20)
    with pytest.raises(RuntimeError), storage.open_write(f"{s3}/left") as out:
        out.write(DATA * 4)
        raise RuntimeError
    store, _ = stores.store_of(s3 + "/left")
    uploads = store._client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert "left" not in [upload["Key"] for upload in uploads]


def test_no_credentials_no_bucket_no_such_scheme(s3, monkeypatch):
    with pytest.raises(StorageError, match="no bucket nobody at http"):
        storage.read("s3://nobody/x")
    with pytest.raises(ValueError, match="unknown scheme; known are s3"):
        storage.read("ftp://host/x")
    with pytest.raises(ValueError, match="names no bucket"):
        storage.read("s3:///x")
    stores._stores.clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        storage.read(f"{s3}/x")
    stores._stores.clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody"):
        storage.read(f"{s3}/x")


def test_refused_access_says_so(s3):
    from botocore.exceptions import ClientError

    store, _ = stores.store_of(s3)
    answer = {"Error": {"Code": "AccessDenied", "Message": "no"}}
    error = ClientError(answer | {"ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")
    assert "refuses access (AccessDenied: no); check" in str(store.problem("s3://bucket/x", error))


class Flaky:
    """A store of which only patience is tested."""

    limits = Limits(patience_s=0.2, first_contact_s=0.1, stall_s=1, low_bytes_s=1, connect_s=1)
    answered = True
    errors = (ConnectionError,)

    def problem(self, url, error):
        return None


def test_progress_renews_patience(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.3)
    patience = Patience(Flaky(), "s3://bucket/x")
    for _ in range(20):
        patience.failed(ConnectionError("mine"))
        time.sleep(0.02)
        patience.progressed(100_000)
    with pytest.raises(StorageError, match="ended with ConnectionError: mine"):
        for _ in range(100):
            patience.failed(ConnectionError("mine"))
            patience.progressed(1)


def test_other_errors_are_not_waited_out():
    def attempt():
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        patiently(Flaky(), "s3://bucket/x", attempt)


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "30")
    assert Limits.of_environment().patience_s == Limits.of_environment().first_contact_s == 30
    monkeypatch.setenv("MOCOV3_STORAGE_STALL_S", "soon")
    with pytest.raises(ValueError, match="MOCOV3_STORAGE_STALL_S=soon is not a number"):
        Limits.of_environment()
