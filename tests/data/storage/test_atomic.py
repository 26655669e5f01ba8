"""Logs outlast a full disk without losing, repeating or mixing a byte."""

import errno
import logging
import os
from pathlib import Path

import pytest

from mocov3_ds.data.storage.atomic import Appender, replace_when_whole, write_text


class Disk:
    """A file on a disk that has room for so many bytes more."""

    def __init__(self, appender: Appender) -> None:
        self.file, self.room = appender._file, 10**9
        appender._file = self  # type: ignore[assignment]

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_what_does_not_fit_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    appender = Appender(path)
    disk = Disk(appender)
    appender.append(b"first\n")
    disk.room = 4
    with caplog.at_level(logging.WARNING):
        appender.append(b"second\n")
        appender.append(b"third\n")
    assert path.read_bytes() == b"first\nseco"
    assert caplog.text.count(f"{path} cannot be written now (No space left on device)") == 1
    disk.room = 100
    appender.append(b"fourth\n")
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    disk.room = 0
    appender.append(b"fifth\n")
    appender.close()
    assert f"{path} lacks its last 6 bytes" in caplog.text


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"x\.json"):

        def full(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_text", full)
        write_text(path, "x")


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(("code", "is_named"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_only_a_failed_write_is_blamed_on_the_file(
    tmp_path: Path, code: int, is_named: bool
) -> None:
    """What a block reads may fail as well: its error is not that of the file that it writes."""
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError, match=os.strerror(code)) as error, replace_when_whole(path):
        fail(code)
    assert error.value.filename == (str(path) if is_named else None)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_sync_is_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    monkeypatch.setattr(os, "fsync", lambda _descriptor: fail(errno.EIO))
    with pytest.raises(OSError, match=r"x\.json") as error:
        write_text(path, "new")
    assert error.value.errno == errno.EIO and not list(tmp_path.iterdir())
