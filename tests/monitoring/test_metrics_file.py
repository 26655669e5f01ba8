"""The rows of `metrics.jsonl`: read whole, cut at a step, gaps named."""

from pathlib import Path

import pytest

from mocov3_ds.monitoring.metrics_file import describe_gap, drop_rows_after, read_rows


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
