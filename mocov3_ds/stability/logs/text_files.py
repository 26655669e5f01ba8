"""How are logs in text files read? CSV, JSON lines and JSON of any program, whole or cut short."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from mocov3_ds.stability.logs.scalar_files import name_scalar
from mocov3_ds.stability.logs.table import (
    Column,
    LoggedTable,
    NothingLoggedError,
    build_columns,
    count_words,
    read_bytes,
    rows_as_columns,
)

_CHART_ENDS = ("__MIN", "__MAX")
"""columns beside each curve in the CSV of a chart that W&B exports: `RUN - METRIC__MIN`"""
_DELIMITERS = (",", ";", "\t", "|")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(?:[eE][-+]?\d+)?%?")
_LARGEST_CELL = 1 << 20

csv.field_size_limit(_LARGEST_CELL)


def read_csv(path: Path) -> list[LoggedTable]:
    """Read a CSV file with names in its first line; a chart of W&B gives several runs.

    A file of TensorBoard's page gives one scalar of the run that its name tells.

    Args:
        path: the file; its delimiter is a comma, semicolon, tab or bar.

    Raises:
        ValueError: it holds no table of numbers; `NothingLoggedError`: no rows yet.
    """
    text = read_bytes(path).decode("utf-8-sig", "replace")
    first = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}.") from None
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise NothingLoggedError(f"{path} has no rows yet: it has no line below its names.")
    names = _name_columns(path, lines[0])
    body = [line for line in lines[1:] if len(line) == len(names)]
    cut = len(lines) - 1 - len(body)
    notes = count_words(cut, "line of another length", "lines of another length")
    if delimiter != "," and _has_decimal_commas(body):
        body = [[_with_point(cell) for cell in line] for line in body]
        notes.append("its numbers have decimal commas")
    columns = build_columns(dict(zip(names, zip(*body, strict=True), strict=True))) if body else {}
    if not columns:
        if len(lines) == 2 and len(lines[1]) < len(names):
            raise NothingLoggedError(f"{path} has no rows yet: its only line is not whole.")
        raise ValueError(f"{path} holds no numbers.")
    empty = [name for name in names if name not in columns]
    table = LoggedTable(path.stem, path, columns, len(body), notes=notes, empty=empty)
    return _split_chart(table) or [name_scalar(table)]


def _has_decimal_commas(body: Sequence[Sequence[str]]) -> bool:
    """Whether numbers have commas for points: never both, and not always three digits after it."""
    cells = [cell for line in body for cell in line if _DECIMAL_COMMA.fullmatch(cell.strip())]
    points = any("." in cell and _is_number(cell) for line in body for cell in line)
    return not points and any(len(re.split("[,eE]", cell.strip())[1]) != 3 for cell in cells)


def _with_point(cell: str) -> str:
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell.strip()) else cell


def _name_columns(path: Path, line: Sequence[str]) -> list[str]:
    """Names of the columns; the second of one name gets a number.

    Raises:
        ValueError: the line holds numbers.
    """
    names: list[str] = []
    for index, cell in enumerate(line):
        name = cell.strip() or f"column {index + 1}"
        names.append(name if name not in names else f"{name} ({index + 1})")
    with_number = [name for name in names if _is_number(name)]
    if with_number and len(with_number) * 2 > len(names):
        raise ValueError(
            f"{path} begins with numbers ({', '.join(with_number[:3])}); its first line must name "
            "the columns, e.g. step,loss,knn."
        )
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split_chart(table: LoggedTable) -> list[LoggedTable]:
    """The runs of a chart exported from W&B; none where the table is no such chart."""
    runs: dict[str, dict[str, Column]] = {}
    if not any(name.endswith(_CHART_ENDS) and " - " in name for name in table.columns):
        return []
    shared = {name: column for name, column in table.columns.items() if " - " not in name}
    for name, column in table.columns.items():
        run, dash, metric = name.rpartition(" - ")
        if dash and not name.endswith(_CHART_ENDS):
            runs.setdefault(run, {})[metric] = column
    return [
        replace(table, name=run, columns={**shared, **columns}, is_chart=True)
        for run, columns in runs.items()
    ]


def read_json(path: Path) -> list[LoggedTable]:
    """Read JSON lines, or JSON: a list of rows, an object of columns, or one that holds such.

    Args:
        path: the file; its last line or row may be cut short.

    Raises:
        ValueError: it holds no rows; `NothingLoggedError`: it is empty.
    """
    data = read_bytes(path)
    if not data.strip():
        raise NothingLoggedError(f"{path} has no rows yet: it is empty.")
    rows, unreadable = _parse_lines(data)
    if not rows or (unreadable and data.lstrip()[:1] == b"[") or _is_one_object(rows, data):
        rows, unreadable = _parse_whole(path, data), 0
    try:
        columns, count = rows_as_columns(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not columns:
        raise ValueError(f"{path} holds no numbers.")
    notes = count_words(unreadable, "line that is no JSON object", "lines that are no JSON objects")
    return [LoggedTable(path.stem, path, columns, count, notes=notes)]


def _is_one_object(rows: Sequence[Mapping[str, Any]], data: bytes) -> bool:
    """Whether a file is one object of rows or columns rather than one row."""
    return len(rows) == 1 and any(isinstance(value, list | dict) for value in rows[0].values())


def _parse_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Rows of JSON lines, and how many lines hold none."""
    rows: list[dict[str, Any]] = []
    unreadable = 0
    for line in data.splitlines():
        if not line.strip():
            continue
        row = parse_line(line)
        if row is None:
            unreadable += 1
            if not rows and unreadable > 1:  # no JSON lines at all
                break
        else:
            rows.append(row)
    return rows, unreadable


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line as a JSON object, also one with NaN or Infinity; None where it is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) else None


def _parse_whole(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Rows of a JSON file that is no JSON lines.

    Raises:
        ValueError: it is no JSON, or holds neither rows nor columns.
    """
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError(f"{path} is no JSON that can be read: it is nested too deep.") from None
    except ValueError:
        tree = list(_salvage(data.decode("utf-8", "replace")))
    rows = _find_rows(tree)
    if not rows:
        raise ValueError(
            f"{path} holds no rows: a log is JSON lines, a list of objects, or an object of "
            "columns."
        )
    return rows


def _salvage(text: str) -> Iterator[dict[str, Any]]:
    """Objects of a list that is cut short."""
    decoder = json.JSONDecoder()
    brace = text.find("{")
    if not text.lstrip().startswith("["):
        return
    while brace >= 0:
        try:
            row, end = decoder.raw_decode(text, brace)
        except (ValueError, RecursionError):
            return
        yield row
        brace = text.find("{", end)


def _find_rows(tree: Any) -> list[dict[str, Any]]:
    """Rows of a list of objects, of an object of columns, or of the one list in an object."""
    if isinstance(tree, list):
        return [row for row in tree if isinstance(row, dict)]
    if not isinstance(tree, dict):
        return []
    lists = [value for value in tree.values() if isinstance(value, list) and value]
    nested = [rows for rows in lists if isinstance(rows[0], dict)]
    if len(nested) == 1:
        return _find_rows(nested[0])
    columns = {name: _column_cells(value) for name, value in tree.items()}
    filled = {name: cells for name, cells in columns.items() if cells}
    if not filled:
        return []
    indices = sorted({index for cells in filled.values() for index in cells})
    return [
        {name: cells[index] for name, cells in filled.items() if index in cells}
        for index in indices
    ]


def _column_cells(value: Any) -> dict[int, Any]:
    """Row -> cell of a column that is a list, or an object with the numbers of the rows."""
    if isinstance(value, list):
        return dict(enumerate(value))
    if isinstance(value, dict) and all(key.isdecimal() and len(key) < 10 for key in value):
        return {int(key): cell for key, cell in value.items()}
    return {}
