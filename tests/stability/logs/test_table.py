"""Columns of numbers from cells of any kind."""

import math
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.stability.logs import table
from mocov3_ds.stability.logs.table import as_column, build_columns, count_words, rows_as_columns


def test_cells_that_are_no_number_are_left_out() -> None:
    cells = [1, "2.5", "", None, True, "word", [3], "nan", 10**400]
    column = as_column(np.arange(10, 19), cells)
    assert column.rows_M.tolist() == [10, 11, 17, 18]
    assert column.values_M[:2].tolist() == [1.0, 2.5]
    assert math.isnan(column.values_M[2]) and column.values_M[3] == math.inf
    assert [*build_columns({"loss": [1, 2], "host": ["a", "b"]})] == ["loss"]


def test_rows_become_columns_and_objects_names_within_names() -> None:
    deep = {"a": {"b": {"c": {"d": {"e": 1.0, "f": {"g": 1.0}}}}}}
    columns, count = rows_as_columns([{"loss": 3, "eval": {"top1": 5}}, {}, {"loss": 2}, deep])
    assert count == 4 and {*columns} == {"loss", "eval/top1", "a/b/c/d/e"}, "six are no column"
    assert columns["loss"].rows_M.tolist() == [0, 2]
    assert columns["loss"].values_M.tolist() == [3.0, 2.0]
    with pytest.raises(ValueError, match="more than 10000 columns"):
        rows_as_columns([{str(name): 0 for name in range(10_001)}])


def test_files_that_are_too_large_or_missing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"12345")
    assert table.read_bytes(path) == b"12345"
    monkeypatch.setattr(table, "LARGEST_FILE", 4)
    with pytest.raises(ValueError, match="Thin it out"):
        table.read_bytes(path)
    with pytest.raises(ValueError, match="cannot be read"):
        table.read_bytes(tmp_path / "none")


def test_counts_in_words() -> None:
    assert count_words(0, "row", "rows") == []
    assert count_words(1, "row", "rows") == ["1 row"]
    assert count_words(2000, "row", "rows") == ["2,000 rows"]
