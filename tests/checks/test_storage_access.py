"""Object storage and shards: damage of any kind is seen from each rank."""

from pathlib import Path

import pytest

from mocov3_ds.checks import storage_access
from mocov3_ds.data import storage
from tests.data.sets import make_set, picture


def test_object_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [sound] = storage_access.check_store(f"{s3}/scratch", size=10_000)
    assert sound.status == "pass", sound
    assert list(storage.list_files(f"{s3}/scratch")) == []
    [absent] = storage_access.check_store("s3://no-such-bucket/scratch", size=10)
    assert absent.status == "fail"
    assert "no bucket" in absent.measured
    assert storage_access.check_store("")[0].status == "skip"
    read = storage.read

    def damaged(url: str, *span: int) -> bytes:
        data = bytearray(read(url, *span))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(storage, "read", damaged)
    [spoilt] = storage_access.check_store(f"{s3}/scratch", size=10_000)
    assert spoilt.status == "fail"
    assert "differ" in spoilt.measured
    monkeypatch.setattr(
        storage, "read", lambda url, *span: read(url)[: span[1]] if span else read(url)
    )
    [ranges] = storage_access.check_store(f"{s3}/scratch", size=10_000)
    assert "bytes 5000 to 6000 differ" in ranges.measured
    monkeypatch.setattr(storage, "read", read)
    monkeypatch.setattr(storage, "list_files", lambda url: iter(()))
    assert (
        "the listing says None" in storage_access.check_store(f"{s3}/scratch", size=10)[0].measured
    )
    monkeypatch.setattr(storage, "remove_file", lambda url: None)
    monkeypatch.setattr(storage_access, "find_damage", lambda *_: "")
    assert (
        "after it was deleted" in storage_access.check_store(f"{s3}/scratch", size=10)[0].measured
    )


def test_shards(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    made = make_set(url, [6, 5])
    reading, decoding = storage_access.check_shards(url)
    assert (reading.status, decoding.status) == ("pass", "pass")
    assert decoding.numbers["images/s"] > 0
    assert storage_access.check_shards("")[0].status == "skip"
    [nothing] = storage_access.check_shards(str(tmp_path))
    assert nothing.status == "fail"
    assert "manifest.json" in nothing.measured
    tar = tmp_path / "set" / made.shards[0].name
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    [spoilt] = storage_access.check_shards(url)
    assert spoilt.status == "fail"
    assert "not those of the manifest" in spoilt.measured
    tar.unlink()
    assert storage_access.check_shards(url)[0].status == "fail"
    make_set(url, [4], image=cut_picture)
    reading, decoding = storage_access.check_shards(url)
    assert (reading.status, decoding.status) == ("pass", "fail")
    assert "1 of 4 images are unreadable" in decoding.measured


def cut_picture(number: int) -> bytes:
    data: bytes = picture(number)
    return data[:-40] if number == 2 else data
