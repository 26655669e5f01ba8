"""How is a table written as CSV? Whole or not at all, and each text as text."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mocov3_ds.data.storage import atomic
from mocov3_ds.settings.spreadsheet import as_cell


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, of which there must be one; all have the columns of the first.

    A text that a spreadsheet would compute as a formula begins with an apostrophe.
    """
    with (
        atomic.replace_when_whole(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: as_cell(value) if isinstance(value, str) else value for key, value in row.items()}
            for row in rows
        )
