"""One pass over a shard: hashed to the last byte, whatever was read of it."""

import hashlib

import pytest

from data_prep.scan import HashingStream, scan_shard
from mocov3_ds.data import storage
from tests.data_prep import forms


def test_a_stream_hashes_what_is_read_and_what_is_passed(tmp_path):
    data = bytes(range(256)) * 9000  # more than two blocks
    storage.write(f"{tmp_path}/x", data)
    stream = HashingStream(f"{tmp_path}/x")
    assert stream.read(10) == data[:10]
    stream.seek(storage.BLOCK - 5)
    assert stream.read(10) == data[storage.BLOCK - 5 : storage.BLOCK + 5]
    with pytest.raises(AssertionError):
        stream.seek(0)
    assert stream.hash_all() == hashlib.sha256(data).hexdigest()
    assert stream.position == len(data) and stream.read(1) == b""


def test_a_scan_says_what_each_sample_is(tmp_path):
    members = {
        "a.jpg": forms.picture(1),
        "a.cls": b"4",
        "b.png": b"broken",
        "c.jpg": b"",
        "c.cls": b"",
    }
    forms.write_tar(tmp_path / "0.tar", members)
    scan = scan_shard("0.tar", url=str(tmp_path), decode_all=True)
    whole = (tmp_path / "0.tar").read_bytes()
    assert (scan.bytes, scan.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert [(s.key, s.label, s.reason) for s in scan.samples] == [
        ("a", 4, ""),
        ("b", None, "not an image"),
        ("c", None, "empty file"),
    ]
    first = scan.samples[0]
    assert whole[first.offset : first.offset + first.size] == members["a.jpg"]
    assert (first.height, first.width) == (24, 25) and not scan.damage
    (tmp_path / "0.tar").write_bytes(whole[:2048])
    scan = scan_shard("0.tar", url=str(tmp_path), decode_all=False)
    assert "cut short" in scan.damage or "past the end" in scan.damage
