"""Logs outlast a full disk without losing, repeating or mixing a byte."""

import errno
import logging
import os
from pathlib import Path

import pytest

from mocov3_ds.data.storage.atomic import (
    Appender,
    is_temporary,
    open_new,
    open_own,
    remove_abandoned,
    replace_when_whole,
    write_text,
)


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


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Of a folder that came from a stranger, or that anybody may write to."""
    theirs = tmp_path / "authorized_keys"
    theirs.write_text("theirs")
    log = tmp_path / "metrics.jsonl"
    log.symlink_to(theirs)
    with pytest.raises(OSError, match="it is a link; remove it"):
        Appender(log)
    write_text(log, "ours")
    assert not log.is_symlink() and log.read_text() == "ours"
    (tmp_path / "nowhere").symlink_to(tmp_path / "made")
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no plain file|No such device"):
        open_own(tmp_path / "pipe", os.O_WRONLY | os.O_APPEND)
    assert theirs.read_text() == "theirs" and not (tmp_path / "made").exists()


def test_no_temporary_name_can_be_foreseen_or_is_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    (tmp_path / "config.json.tmp").write_text("mine")
    seen = []
    for _ in range(2):
        with replace_when_whole(path) as temporary:
            assert temporary.read_bytes() == b""
            seen.append(temporary.name)
    assert len({*seen}) == 2 and all(is_temporary(name) for name in seen)
    assert (tmp_path / "config.json.tmp").read_text() == "mine"
    for name in ("thesis.tmp", "a.12.tmp", "a.12-0123abcd", ".12-0123abcd.tmp", "a.x-0123abcd.tmp"):
        assert not is_temporary(name)


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        Appender(tmp_path / "b").close()
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_only_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    old, young = "a.json.7-0123abcd.tmp", "b.json.7-0123abcd.tmp"
    for name in (old, young, "thesis.tmp", "a.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.7-0123abcd.tmp").symlink_to(tmp_path / "a.json")
    os.utime(tmp_path / old, (1, 1))
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "none")
    left = ["a.json", young, "link.7-0123abcd.tmp", "thesis.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    remove_abandoned(tmp_path, age_s=0.0)
    assert not (tmp_path / young).exists() and (tmp_path / "thesis.tmp").exists()
