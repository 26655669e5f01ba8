"""Storage: one behaviour on a folder and on stores."""

import hashlib
import os
import tarfile

import numpy as np
import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import FileEntry, Truncated, stores
from tests.data.sets import make_tar
from tests.data.storage.faults import DATA


@pytest.fixture(params=["folder", "s3", "obstore"])
def url(request, tmp_path):
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "folder":
        return str(tmp_path / "deep" / "folder")
    bucket = request.getfixturevalue("s3")
    if request.param == "obstore":
        request.getfixturevalue("obstore_for_s3")
    return f"{bucket}/{request.node.name.replace('[', '-').strip(']')}"


def test_what_is_written_is_read(url):
    file = storage.join_url(url, "a.bin")
    assert not storage.exists(file)
    storage.write(file, DATA)
    assert storage.exists(file) and storage.file_size(file) == len(DATA)
    assert storage.read(file) == DATA
    assert storage.read(file, 5, 1_500_000) == DATA[5:1_500_000]
    assert storage.read(file, 2_999_999) == DATA[-1:]
    assert b"".join(storage.read_blocks(file)) == DATA
    assert b"".join(storage.read_blocks(file, 7, 2_000_000)) == DATA[7:2_000_000]
    assert max(map(len, storage.read_blocks(file))) <= storage.BLOCK
    storage.write(file, b"other")
    assert storage.read(file) == b"other"
    storage.write(file, b"")
    assert storage.read(file) == b"" and storage.file_size(file) == 0
    storage.remove_file(file)
    storage.remove_file(file)
    assert not storage.exists(file)


def test_seeking(url):
    file = storage.join_url(url, "seek.bin")
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
    storage.write(storage.join_url(url, "a.tar"), make_tar(members)[0])
    for mode in ("r:", "r|"):
        with (
            storage.open_read(storage.join_url(url, "a.tar")) as file,
            tarfile.open(fileobj=file, mode=mode) as tar,
        ):
            assert [(m.name, tar.extractfile(m).read()) for m in tar] == members


def test_entries_are_the_files_right_inside(url):
    assert storage.list_files(url) == []
    for name in ("b.tar", "a.tar", "deeper/c.tar"):
        storage.write(storage.join_url(url, name), b"12345")
    storage.write(f"{url}-beside/d.tar", b"1")
    assert storage.list_files(url) == [FileEntry("a.tar", 5), FileEntry("b.tar", 5)]
    assert storage.list_files(url + "/") == storage.list_files(url)


def test_streamed_writes_are_all_or_nothing(url):
    if not storage.is_local(url):
        stores.store_for_url(url)[0].part_bytes = 5 << 20
    file, data = storage.join_url(url, "long.bin"), DATA * 5
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
    assert storage.list_files(url) == [FileEntry("long.bin", len(data))]


def test_what_is_not_there_and_what_is_too_short(url):
    file = storage.join_url(url, "short.bin")
    with pytest.raises(FileNotFoundError):
        storage.read(file)
    with pytest.raises(FileNotFoundError):
        storage.file_size(file)
    storage.write(file, b"12345")
    with pytest.raises(Truncated, match=r"short\.bin"):
        storage.read(file, 2, 6)
    with pytest.raises(Truncated, match=r"short\.bin"):
        storage.read(file, 20, 30)
    with pytest.raises(Truncated, match=r"short\.bin"):
        list(storage.read_blocks(file, 0, 6))


def test_a_file_url_is_a_path(tmp_path):
    storage.write(f"file://{tmp_path}/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1" and storage.is_local(f"file://{tmp_path}")
    assert not storage.is_local("s3://bucket")


def test_a_local_write_that_fails_leaves_no_temporary_file(tmp_path):
    with pytest.raises(RuntimeError), storage.open_write(f"{tmp_path}/a") as file:
        file.write(b"half")
        assert storage.list_files(str(tmp_path)) == []
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_caller_keeps_its_words(tmp_path):
    words = "s3://bucket/x: no progress"
    with pytest.raises(storage.StorageError) as error, storage.open_write(f"{tmp_path}/a"):
        raise storage.StorageError(words)
    assert str(error.value) == words
