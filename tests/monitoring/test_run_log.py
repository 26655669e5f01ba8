"""The log of a run: one line a step, and a resumed run's file reads like an unbroken one's."""

import contextlib
import errno
import io
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from mocov3_ds.monitoring import run_log
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.monitoring.run_log import RunLog
from tests.disk import largest_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard


def log_steps(folder: Path, first: int, last: int) -> None:
    log = RunLog(folder, steps_done=first, total_steps=10, speaks=True)
    if first == 0:
        log.log_values(0, knn_full=1.0)
    for step in range(first + 1, last + 1):
        log.log_step({"step": step, "loss": float(step), "knn": 5.0 if step % 2 else None})
    log.close()


def test_one_line_a_step_and_no_step_twice(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 7)
    log_steps(tmp_path, 4, 6)  # killed after step 7, the checkpoint was at step 4
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_afresh_drops_everything(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 3)
    log_steps(tmp_path, 0, 2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    log_steps(tmp_path, 3, 4)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_damaged_lines_are_left_out_and_the_others_stay(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1], lines[2] = b'{"step": 1, \xff\xfe}', b"[1, 2]"
    lines[3] = b'{"step": "three"}'
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in read_rows(path)] == [0, 4, 5]
    log_steps(tmp_path, 4, 5)
    assert [row["step"] for row in read_rows(path)] == [0, 4, 5]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps_done=0, total_steps=3, speaks=False)
    log.log_values(0, knn=1.0)
    log.log_step({"step": 1, "loss": 1.0})
    log.print_line("nothing")
    log.close()
    assert not any(tmp_path.iterdir())


class RowsInMemory:
    """A sink that a test can look at."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str]] = []
        self.closed = False

    def show_row(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def show_picture(self, step: int, name: str, _picture: Image.Image) -> None:
        self.pictures.append((step, name))

    def drop_steps_after(self, step: int) -> None:
        self.rows = [row for row in self.rows if row[0] <= step]

    def close(self) -> None:
        self.closed = True


def test_a_rewound_run_forgets_the_steps_it_will_do_again(tmp_path: Path) -> None:
    sink = RowsInMemory()
    sinks = {"mine": lambda *_: sink}
    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True, sinks=sinks)
    for step in (1, 2, 3):
        log.log_step({"step": step, "loss": 1.0})
    log.drop_steps_after(1)
    log.log_step({"step": 2, "loss": 2.0})
    log.close()
    rows = [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [(1, 1.0), (2, 2.0)]
    assert [(step, values["train/loss"]) for step, values in sink.rows] == rows
    assert sink.closed


def test_each_sink_gets_numbers_layers_figures_and_pictures(tmp_path: Path) -> None:
    sink = RowsInMemory()
    sinks = {"mine": lambda *_: sink}
    log = RunLog(tmp_path, steps_done=0, total_steps=2500, speaks=True, sinks=sinks)
    layers = {"block_0/rms": 0.5, "block_0/entropy": 0.25}
    for step in (1, 2):
        log.log_step({"step": step, "loss": 0.5, "knn": None, "alarms": ["rms_high"]}, layers)
    log.show_picture(2, "train/views", lambda: Image.new("RGB", (1, 1)))
    log.close()
    (first, values), (second, more) = sink.rows
    assert (first, second) == (1, 2)
    assert values["system/machine_process_gib"] > 0.01
    assert "system/machine_process_gib" not in more  # every ten seconds
    # a long run shows all layers every few steps; what is rare is shown each time
    numbers = {"train/loss": 0.5, "train/alarms": 1, "layers/entropy/block_0": 0.25}
    assert values.items() >= numbers.items() and "layers/rms/block_0" not in values
    assert more == {**numbers, "layers/rms/block_0": 0.5}
    assert sink.pictures == [(2, "train/views")]


def test_a_sink_that_does_not_open_warns_once_and_the_others_get_their_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def never_opens(_run: Path, _steps_done: int) -> RowsInMemory:
        raise RuntimeError("no such server")

    good = RowsInMemory()
    sinks = {"bad": never_opens, "good": lambda *_: good}
    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True, sinks=sinks)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.log_step({"step": step, "loss": 0.5})
        log.close()
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert caplog.text.count("--log bad cannot be opened (RuntimeError: no such server)") == 1
    assert caplog.text.count("--log bad has not got 3 of 3 rows") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_the_plan_is_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
    log.tell_plan("plan: as expected")
    log.close()
    assert (tmp_path / "plan.txt").read_text() == "plan: as expected\n"


def test_a_full_disk_does_not_end_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
    path = tmp_path / "metrics.jsonl"
    log.log_step({"step": 1, "loss": 1.0})
    with largest_file(path.stat().st_size + 5):  # no row fits, and the first one in part
        for step in (2, 3):
            log.log_step({"step": step, "loss": 1.0})
        assert [row["step"] for row in read_rows(path)] == [1]
    log.log_step({"step": 4, "loss": 1.0})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([1, 2, 3, 4, 5], ""),
        ([1, 2, 3, 5], "lacks the row of step 4 (1 of 5)"),
        ([3], "lacks the rows of step 1 to 2, 4 to 5 (4 of 5)"),
        ([], "lacks the rows of step 1 to 5 (5 of 5)"),
    ],
)
def test_a_gap_is_told_when_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: list[int], words: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in [0, *steps]) + '{"step": 6, "lo')
    with caplog.at_level(logging.WARNING):
        RunLog(tmp_path, steps_done=5, total_steps=9, speaks=True).close()
    assert (words in caplog.text) if words else not caplog.text


def test_rows_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path) -> None:
    synced: list[str] = []

    def note(path: Path) -> None:
        synced.append(path.read_text())

    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
    with mock.patch.object(run_log, "sync_to_disk", note):
        log.log_step({"step": 1})
        log.sync()
    log.close()
    assert synced == ['{"step": 1}\n']


class Gone(io.StringIO):
    """A terminal that has gone."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    with mock.patch.object(sys, "stderr", Gone()), mock.patch.object(sys, "stdout", Gone()):
        with contextlib.suppress(OSError):  # it was there when the run began
            log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
        with mock.patch.object(run_log.tqdm, "write", side_effect=OSError(errno.EIO, "gone")):
            log.log_step({"step": 1})
            log.print_line("nobody reads this")
            log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_what_is_wrong_is_said_at_once_at_the_end_and_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, steps_done=0, total_steps=9, speaks=True)
    log.log_step({"step": 1, "applied": False})
    assert "step 1: the fp16 gradient overflowed" in capsys.readouterr().out
    said = log.describe_troubles()
    assert said == ["fp16: 1 step skipped by an overflow"]
    log.close()
    resumed = RunLog(tmp_path, steps_done=1, total_steps=9, speaks=True)
    assert resumed.describe_troubles() == said
    resumed.drop_steps_after(0)
    assert resumed.describe_troubles() == []
    resumed.close()
