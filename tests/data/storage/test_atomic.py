"""Logs outlast a full disk without losing, repeating or mixing a byte."""

import errno
import logging
from pathlib import Path

import pytest

from mocov3_ds.data.storage.atomic import Appender, write_text
from mocov3_ds.monitoring.run_log import RunLog, read_rows


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_a_full_disk_does_not_end_the_report(tmp_path: Path) -> None:
    report = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
    disk = Disk(report._rows)
    for step in range(1, 6):
        disk.room = 0 if step in (2, 3) else 10**9
        report.log_step({"step": step, "loss": 1.0})
    assert report._board is not None

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    report._board.add_scalar = refuse  # type: ignore[method-assign]
    report.log_step({"step": 6, "loss": 1.0})
    report.log_step({"step": 7, "loss": 1.0})
    report.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"x\.json"):

        def full(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_text", full)
        write_text(path, "x")
