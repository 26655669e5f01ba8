"""Reading a file of a store: faults that pass cost time alone, others end in a sentence."""

import os
import threading

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import Changed, Stopped, StorageError
from mocov3_ds.data.storage.remote_file import RemoteFile
from mocov3_ds.distributed import ranks
from tests import object_store
from tests.data.storage.faults import DATA, behind_faults, serve_without_ranges
from tests.fault_proxy import KINDS


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"wrong"}))
def test_a_fault_that_passes_is_survived(s3_server, big, kind):
    proxy, environment = behind_faults(s3_server, {kind: 1.0}, limit=2)
    with proxy, environment:
        assert storage.read(big, 1) == DATA[1:]
        # a range says the length as well
        assert proxy.injected[kind] == (1 if kind == "nolength" else 2)


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_reading_goes_on_from_the_byte_reached(s3_server, big, kind):
    proxy, environment = behind_faults(s3_server, {kind: 1.0}, limit=1)
    with proxy, environment:
        assert storage.read(big, 1000, 2_900_000) == DATA[1000:2_900_000]
        first, *later = (span for _, span in proxy.ranges)
    assert first == "bytes=1000-2899999" and all(span.endswith("-2899999") for span in later)
    begins = [int(span.removeprefix("bytes=").split("-")[0]) for span in later]
    if kind == "stall":  # a slow machine asks again more often, and never for what it has
        assert begins and begins == sorted(begins) and begins[0] <= 1_450_500 and begins[-1] > 1000
    else:
        assert len(begins) == 1 and 1000 < begins[0] <= 1_450_500


@pytest.mark.parametrize("kind", ["503", "trickle", "refuse"])
def test_a_fault_for_good_ends_in_bounded_time_with_a_sentence(s3_server, big, kind):
    proxy, environment = behind_faults(
        s3_server, {kind: 1.0}, stall_s=0.2, low_bytes_s=1e9, patience_s=1.5
    )
    words = r"big\.tar: no progress for \d+ s in \d+ attempts"
    with proxy, environment, pytest.raises(StorageError, match=words):
        storage.read(big)


def test_a_store_that_never_answered_is_given_up_sooner():
    limits = {"patience_s": 600, "first_contact_s": 0.3}
    nobody = f"http://127.0.0.1:{ranks.free_port()}"
    with (
        object_store.environment(nobody, **limits),
        pytest.raises(StorageError, match="no progress"),
    ):
        storage.read("s3://bucket/x")


def test_a_stopped_reader_gives_up_at_once(s3_server, big):
    proxy, environment = behind_faults(s3_server, {"503": 1.0}, patience_s=600)
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
    with object_store.environment(server.url):
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


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_server_without_ranges_is_read_all_the_same(scheme):
    with (
        serve_without_ranges() as address,
        object_store.environment(f"http://{address}"),
    ):
        where = "s3://bucket" if scheme == "s3" else f"http://{address}"
        assert storage.read(f"{where}/x", 2_000_000, 2_000_100) == DATA[2_000_000:2_000_100]
        assert storage.read(f"{where}/x") == DATA


def test_a_short_way_forward_is_read_through_and_other_jumps_ask_anew(s3_server, big):
    proxy, environment = behind_faults(s3_server, {})
    with proxy, environment, RemoteFile(big, 0, None, None) as file:
        assert file.read(10) == DATA[:10]
        file.seek(20_000)
        assert file.read(10) == DATA[20_000:20_010] and len(proxy.ranges) == 1
        file.seek(5)
        assert file.read(10) == DATA[5:15] and len(proxy.ranges) == 2
        file.seek(-10, os.SEEK_END)
        assert file.read(20) == DATA[-10:] and file.tell() == len(DATA)
