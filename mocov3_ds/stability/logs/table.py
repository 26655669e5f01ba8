"""What is a log of any program? Columns of numbers, each with the rows in which it was written.

Shape suffixes: M = rows in which a column was written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.stability.findings import Array, Steps

LARGEST_FILE = 2 << 30
"""bytes of a log that is still read"""
_DEPTH = 4  # objects within objects whose values become columns
_MOST_COLUMNS = 10_000


class NothingLoggedError(ValueError):
    """A log has no rows yet, as that of a run that has just begun."""


@dataclass(frozen=True, eq=False)
class Column:
    """The numbers of one column, in the order in which they were written."""

    rows_M: Steps
    """number of the row of each"""
    values_M: Array
    """float64; NaN and infinities are those that the program wrote"""


@dataclass(frozen=True, eq=False)
class LoggedTable:
    """What one run logged, before it is known what means what."""

    name: str
    """name of the run"""
    source: Path
    """file or folder that it was read from"""
    columns: Mapping[str, Column]
    """those with a number in at least one row"""
    rows: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """settings of the run by name, where they lie beside the log"""
    notes: Sequence[str] = ()
    """what was left out, clauses"""
    empty: Sequence[str] = ()
    """names of columns without a number in any row"""
    is_chart: bool = False
    """whether it is one curve of the run, as a chart of W&B is, which others may complete"""


def build_columns(values: Mapping[str, Sequence[Any]]) -> dict[str, Column]:
    """Make columns of values as a file has them; what is no number is left out.

    Args:
        values: name -> a value for each row: a number, its text, or None.
    """
    columns = {}
    for name, cells in values.items():
        column = as_column(np.arange(len(cells), dtype=np.int64), cells)
        if len(column.rows_M):
            columns[name] = column
    return columns


def as_column(rows_M: Steps, cells: Sequence[Any]) -> Column:
    """Make a column of the cells that are numbers.

    Args:
        rows_M: number of the row of each cell.
        cells: a number, its text, or something else for each.
    """
    exact = all(type(cell) is float or type(cell) is int for cell in cells)
    try:
        if exact:
            return Column(rows_M, np.array(cells, np.float64))
    except OverflowError:  # an integer of hundreds of digits
        pass
    numbers = [(row, _as_number(cell)) for row, cell in zip(rows_M.tolist(), cells, strict=True)]
    numbered = [(row, value) for row, value in numbers if value is not None]
    return Column(
        np.array([row for row, _ in numbered], np.int64),
        np.array([value for _, value in numbered], np.float64),
    )


def _as_number(cell: Any) -> float | None:
    """The number that a cell holds; None where it holds none."""
    if cell is None or cell == "" or isinstance(cell, bool):
        return None
    if not isinstance(cell, str | int | float):
        return None
    if isinstance(cell, str):
        cell = cell.strip().removesuffix("%")
    try:
        return float(cell)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def rows_as_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Column], int]:
    """Make columns of rows with a value by name, as JSON has them.

    Args:
        rows: names -> values; a value that is an object gives columns NAME/INNER.

    Returns:
        The columns, and the number of rows.

    Raises:
        ValueError: there are too many names.
    """
    cells: dict[str, list[Any]] = {}
    places: dict[str, list[int]] = {}
    count = 0
    for index, row in enumerate(rows):
        count = index + 1
        for name, value in row.items():
            if value.__class__ is dict:
                _add_inner(name, value, index, cells, places, _DEPTH)
            elif name in cells:
                cells[name].append(value)
                places[name].append(index)
            else:
                cells[name], places[name] = [value], [index]
        if len(cells) > _MOST_COLUMNS:
            raise ValueError(f"it has more than {_MOST_COLUMNS} columns.")
    columns = {
        name: as_column(np.array(places[name], np.int64), values) for name, values in cells.items()
    }
    return {name: column for name, column in columns.items() if len(column.rows_M)}, count


def _add_inner(
    prefix: str,
    tree: Mapping[str, Any],
    index: int,
    cells: dict[str, list[Any]],
    places: dict[str, list[int]],
    depth: int,
) -> None:
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        if isinstance(value, dict):
            if depth > 1:
                _add_inner(path, value, index, cells, places, depth - 1)
        else:
            cells.setdefault(path, []).append(value)
            places.setdefault(path, []).append(index)


def read_bytes(path: Path) -> bytes:
    """Content of a log.

    Raises:
        ValueError: it cannot be read, or is larger than `LARGEST_FILE`.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(
                f"{path} has {size / (1 << 30):.1f} GiB; logs of at most "
                f"{LARGEST_FILE >> 30} GiB are read. Thin it out."
            )
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def count_words(count: int, one: str, more: str) -> list[str]:
    """A clause about a count, or none where it is 0."""
    return [f"{count:,} {one if count == 1 else more}"] if count else []
