"""The rows of `metrics.jsonl`: read whole, cut at a step, gaps named."""

import json
from pathlib import Path

import pytest

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
