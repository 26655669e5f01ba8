"""The rows of `metrics.jsonl`: read whole, cut at a step, gaps named."""

import json
from pathlib import Path

import pytest

from mocov3_ds.monitoring import metrics_file
from mocov3_ds.monitoring.metrics_file import (
    describe_gap,
    drop_rows_after,
    read_rows,
    skim_rows,
)


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_bytes(b'{"step": 1}\n[1]\n{"step": "2"}\n{"loss": 1}\n\xff\n{"step": 3}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 3}]


def test_rows_of_later_steps_are_dropped_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert drop_rows_after(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("steps", "begins_at", "words"),
    [
        ([1, 2, 3, 4, 5], 0, ""),
        ([4, 5], 3, ""),
        ([5], 3, "lacks the row of step 4 (1 of 2)"),
        ([3], 0, "lacks the rows of step 1 to 2, 4 to 5 (4 of 5)"),
    ],
)
def test_a_gap_is_named(steps: list[int], begins_at: int, words: str) -> None:
    said = describe_gap([{"step": step} for step in steps], 5, begins_at)
    assert (words in said) if words else not said


def test_a_glance_counts_all_lines_and_reads_the_rows_with_a_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(300)]
    for step in (0, 7, 299):
        rows[step]["knn_full"] = step / 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    skimmed = skim_rows(path, "knn")
    assert skimmed.lines == 300
    assert skimmed.named == [rows[0], rows[7], rows[299]]
    assert skimmed.sample[-1] == rows[-1] and all(row in rows for row in skimmed.sample)
    assert len({row["step"] for row in skimmed.sample}) > 50


@pytest.mark.parametrize(
    ("content", "lines", "named"),
    [(b"", 0, []), (b'{"step": 1, "knn": 2}', 1, [1]), (b'\n{"step": 3}\n{"st, "knn', 3, [])],
)
def test_a_glance_at_short_and_torn_logs(
    tmp_path: Path, content: bytes, lines: int, named: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    skimmed = skim_rows(path, "knn")
    assert skimmed.lines == lines
    assert [row["step"] for row in skimmed.named] == named


@pytest.mark.parametrize("piece", [5, 7, 64, 1 << 20])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n\n"])
def test_a_glance_finds_what_reading_each_line_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, ending: str
) -> None:
    monkeypatch.setattr(metrics_file, "_PIECE", piece)
    monkeypatch.setattr(metrics_file, "_REACH", 8)
    rows = [{"step": i, "lr": 0.1, "text": "k" * (i * i % 41)} for i in range(90)]
    for step in (0, 1, *range(30, 50), 88, 89):
        rows[step]["knn"] = 1.5
    rows[44]["knn_momentum"] = 2.5
    content = "\n".join(map(json.dumps, rows)) + ending
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    skimmed = skim_rows(path, "knn")
    assert skimmed.named == [row for row in read_rows(path) if "knn" in row]
    assert skimmed.lines == len(content.rstrip("\n").split("\n"))
    end = len(content.rstrip("\n"))
    numbers = [content[: i * end // 64].count("\n") for i in range(64)]
    assert skimmed.sample == [rows[number] for number in [*numbers, 89]]


def test_a_glance_at_a_log_that_was_cut_meanwhile_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' * 5)
    with path.open("rb", buffering=0) as file:
        assert metrics_file._read_line_around(file, 1000) == (b"", 60)
