"""A table is written whole or not at all."""

import csv
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


def test_no_text_becomes_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    names = [
        "=cmd|'A'!A0",
        "+1",
        "-1",
        "@sum",
        "\t=1",
        'a "b", c\nd',
        "$x$",
        "<b>",
        "\ud800",
    ]
    write_csv(path, [{"name": name, "value": -1.5} for name in names])
    with path.open(newline="", encoding="utf-8") as file:
        read = [row["name"] for row in csv.DictReader(file)]
    assert read == [f"'{name}" for name in names[:5]] + [*names[5:8], "\\ud800"]
    assert path.read_text().count("-1.5") == len(names)  # a number stays one
