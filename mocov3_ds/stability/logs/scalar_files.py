"""CSV files of TensorBoard's page: one scalar a file, which the file's name tells.

run-NAME-tag-train_loss.csv        Wall time,Step,Value
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mocov3_ds.stability.logs.table import LoggedTable

_NAMES = ("wall time", "step", "value")
_TAGGED = re.compile(r"(?:run-)?(.*)-tag-(.+?)(?: ?\(\d+\))?", re.DOTALL)
"""run and scalar in the name of a file; a browser numbers the second download"""


def is_scalar(names: Sequence[str]) -> bool:
    """Whether a table has the columns of such a file."""
    return tuple(name.strip().lower() for name in names) == _NAMES


def is_scalar_file(path: Path) -> bool:
    """Whether a file is named as such a download is."""
    return _TAGGED.fullmatch(path.stem) is not None


def name_scalar(table: LoggedTable) -> LoggedTable:
    """A table of one scalar as a chart of its run; any other table as it is.

    Args:
        table: content of a CSV file.
    """
    tagged = _TAGGED.fullmatch(table.source.stem)
    names = list(table.columns)
    if tagged is None or not is_scalar(names):
        return table
    _, step, value = names
    run, tag = tagged[1], tagged[2]
    if run in ("", "."):  # of the folder that TensorBoard was started with
        run = table.source.resolve().parent.name
    columns = {
        step: table.columns[step],
        tag if tag != step else f"{tag} (logged)": table.columns[value],
    }
    return replace(table, name=run, columns=columns, is_chart=True)
