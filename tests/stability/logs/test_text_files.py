"""CSV, JSON lines and JSON of other programs: whole, cut short, with gaps, and what is no log."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.stability.logs.table import LoggedTable
from mocov3_ds.stability.logs.text_files import read_csv, read_json


def values(table: LoggedTable) -> dict[str, list[tuple[int, float]]]:
    """Row and value of each number of a table."""
    return {
        name: list(zip(column.rows_M.tolist(), column.values_M.tolist(), strict=True))
        for name, column in table.columns.items()
    }


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_with_gaps_words_and_a_torn_line(tmp_path: Path, mark: str) -> None:
    text = "\ufeffstep,train/loss,note,acc\n1,4.5,a,\n2,nan,b,0.25\n\n3,4.".replace(",", mark)
    [table] = read_csv(written(tmp_path / "run.csv", text))
    found = values(table)
    assert found["step"] == [(0, 1.0), (1, 2.0)] and found["acc"] == [(1, 0.25)]
    assert found["train/loss"][0] == (0, 4.5) and math.isnan(found["train/loss"][1][1])
    assert "note" not in found  # words
    assert table.rows == 2 and table.notes == ["1 line of another length"]


def test_a_chart_of_wandb_is_several_runs(tmp_path: Path) -> None:
    header = '"Step","hot - sun-1 - val/acc","hot - sun-1 - val/acc__MIN","hot - sun-1 - '
    header += 'val/acc__MAX","calm-2 - val/acc","calm-2 - val/acc__MIN","calm-2 - val/acc__MAX"'
    path = written(tmp_path / "chart.csv", f'{header}\n0,1,0,2,"","",""\n5,3,2,4,9,8,10\n')
    tables = read_csv(path)
    assert [table.name for table in tables] == ["hot - sun-1", "calm-2"]
    assert values(tables[1]) == {"Step": [(0, 0.0), (1, 5.0)], "val/acc": [(1, 9.0)]}
    assert all(table.is_chart for table in tables)


ROWS: list[dict[str, Any]] = [{"_step": 0, "loss": 2.0}, {"_step": 1, "loss": 1.5, "acc": 3}]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\n".join(map(json.dumps, ROWS)) + '\n{"_step": 2, "lo',
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS)[:-1] + ', {"_step": 2, "lo',
        json.dumps({"best": 3, "log_history": ROWS}),
        json.dumps({"_step": [0, 1], "loss": [2.0, 1.5], "acc": [None, 3]}),
        json.dumps({"_step": {"0": 0, "1": 1}, "loss": {"0": 2.0, "1": "1.5"}, "acc": {"1": 3}}),
    ],
    ids=["lines", "torn", "list", "indented", "torn list", "trainer", "columns", "indexed"],
)
def test_json_in_all_its_forms(tmp_path: Path, text: str) -> None:
    [table] = read_json(written(tmp_path / "log.json", text))
    assert values(table) == {
        "_step": [(0, 0.0), (1, 1.0)],
        "loss": [(0, 2.0), (1, 1.5)],
        "acc": [(1, 3.0)],
    }
    assert table.rows == 2


def test_json_lines_with_nan_and_objects_within(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "train": {"loss": NaN, "lr": {"body": 0.1}}}\nnoise\n{"step": 2, "up": true}'
    )
    [table] = read_json(written(tmp_path / "log.jsonl", text))
    found = values(table)
    assert math.isnan(found["train/loss"][0][1]) and found["train/lr/body"] == [(0, 0.1)]
    assert "up" not in found  # a truth value is no number
    assert table.notes == ["1 line that is no JSON object"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "1,2,3\n4,5,6\n", "its first line must name the columns"),
        ("a.csv", "step,loss\n", "has no line below its names"),
        ("a.csv", "step,loss\na,b\n", "holds no numbers"),
        ("a.csv", "a" * 2_000_000 + "\n1", "is no CSV: field larger than field limit"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", '{"a": ' * 100_000, "nested too deep"),
        ("a.json", '"words"', "holds no rows"),
        ("a.jsonl", "words\nmore words\n", "holds no rows"),
        ("a.jsonl", '{"words": "a"}\n{"words": "b"}', "holds no numbers"),
        ("a.jsonl", json.dumps({str(n): n for n in range(10_001)}), "more than 10000 columns"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    read = read_csv if name.endswith(".csv") else read_json
    with pytest.raises(ValueError, match=sentence):
        read(written(tmp_path / name, text))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "none")


def test_a_number_of_hundreds_of_digits(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 1' + "0" * 400 + "}"
    [table] = read_json(written(tmp_path / "log.jsonl", text))
    assert values(table)["loss"] == [(0, math.inf)]


def test_decimal_commas_where_no_number_has_a_point(tmp_path: Path) -> None:
    [table] = read_csv(written(tmp_path / "run.csv", "step;loss;acc\n1;4,5;12,3%\n2;4,25;13%\n"))
    assert values(table)["loss"] == [(0, 4.5), (1, 4.25)]
    assert values(table)["acc"] == [(0, 12.3), (1, 13.0)]
    assert table.notes == ["its numbers have decimal commas"]
    [table] = read_csv(written(tmp_path / "thousands.csv", "step;loss\n1;4,500\n2;3,250\n"))
    assert "loss" not in values(table)  # thousands, or a decimal comma?
