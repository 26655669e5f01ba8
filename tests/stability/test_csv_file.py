"""A table is written whole or not at all."""

from pathlib import Path

import pytest

from mocov3_ds.stability.csv_file import write_csv


def test_rows_under_the_names_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"a": 1, "b": "x, y"}, {"a": None, "b": 2.5}])
    assert path.read_text().splitlines() == ["a,b", '1,"x, y"', ",2.5"]
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(path, [{"a": 1}, {"c": 2}])
    assert path.read_text().splitlines()[0] == "a,b"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
