"""The log of a run: one line a step, and a resumed run's file reads like an unbroken one's."""

from pathlib import Path

import pytest

from mocov3_ds.monitoring.run_log import Report, read_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard


def log(folder: Path, first: int, last: int) -> None:
    report = Report(folder, steps_done=first, total_steps=10, speaks=True)
    if first == 0:
        report.values(0, knn_full=1.0)
    for step in range(first + 1, last + 1):
        report.step({"step": step, "loss": float(step), "knn": 5.0 if step % 2 else None})
    report.close()


def test_one_line_a_step_and_no_step_twice(tmp_path: Path) -> None:
    log(tmp_path, 0, 7)
    log(tmp_path, 4, 6)  # killed after step 7, the checkpoint was at step 4
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_run_that_starts_afresh_drops_everything(tmp_path: Path) -> None:
    log(tmp_path, 0, 3)
    log(tmp_path, 0, 2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    log(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    log(tmp_path, 3, 4)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_damaged_lines_are_left_out_and_the_others_stay(tmp_path: Path) -> None:
    log(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1], lines[2] = b'{"step": 1, \xff\xfe}', b"[1, 2]"
    lines[3] = b'{"step": "three"}'
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in read_rows(path)] == [0, 4, 5]
    log(tmp_path, 4, 5)
    assert [row["step"] for row in read_rows(path)] == [0, 4, 5]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    report = Report(tmp_path, steps_done=0, total_steps=3, speaks=False)
    report.values(0, knn=1.0)
    report.step({"step": 1, "loss": 1.0})
    report.say("nothing")
    report.close()
    assert not any(tmp_path.iterdir())
