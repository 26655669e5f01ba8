"""The file `metrics.jsonl` of a run: one JSON line a step, the truth about its numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mocov3_ds.data.storage.atomic import write_text

Row = Mapping[str, Any]
"""JSON values of a step by name; `step` is the number of optimizer steps done"""

_NAMED_SPANS = 8
_SAMPLED = 64


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, without lines that a kill cut short or a disk damaged.

    Args:
        path: The file, which may not exist yet.
    """
    if not path.exists():
        return []
    rows = map(_read_row, path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Read a line; None where it is no row."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)  # NaN and Infinity
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


@dataclass(frozen=True)
class SkimmedLog:
    """What a glance at a `metrics.jsonl` tells; the lines between are not read.

    Attributes:
        lines: Number of lines.
        named: Rows that have one of the names that were asked for, in the order of the file.
        sample: Rows at even distances, the last line among them.
    """

    lines: int
    named: Sequence[Row]
    sample: Sequence[Row]


def skim_rows(path: Path, beginning: str) -> SkimmedLog:
    """Read some rows of a `metrics.jsonl`, which takes a tenth of the time of `read_rows`.

    Args:
        path: The file, which must exist.
        beginning: Beginning of names that few rows have, such as `knn`.
    """
    content = path.read_bytes()
    end = len(content.rstrip(b"\n"))
    named, sought = [], f'"{beginning}'.encode()
    found = content.find(sought)
    while found >= 0:
        start, stop = _line_around(content, found)
        named.append(content[start:stop])
        found = content.find(sought, stop)
    sampled = [content[slice(*_line_around(content, i * end // _SAMPLED))] for i in range(_SAMPLED)]
    last = content[slice(*_line_around(content, max(end - 1, 0)))]
    return SkimmedLog(
        lines=content.count(b"\n", 0, end) + (end > 0),
        named=[row for row in map(_read_row, named) if row is not None],
        sample=[row for row in map(_read_row, (*sampled, last)) if row is not None],
    )


def _line_around(content: bytes, position: int) -> tuple[int, int]:
    """Where the line begins and ends that a byte is in; a line end belongs to the line before."""
    stop = content.find(b"\n", position)
    return content.rfind(b"\n", 0, position) + 1, stop if stop >= 0 else len(content)


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a `metrics.jsonl` without the rows of later steps.

    Args:
        path: The file, which may not exist yet.
        step: Number of the last step whose row stays.

    Returns:
        The rows that stay.

    Raises:
        OSError: The file cannot be written; its old content stays.
    """
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def describe_gap(rows: Sequence[Row], steps_done: int, begins_at: int = 0) -> str:
    """Say which steps have no row though they were done; empty where each has one.

    Args:
        rows: Rows of a `metrics.jsonl`.
        steps_done: Number of steps done.
        begins_at: Number of steps before the run's own first one.
    """
    missing = sorted({*range(begins_at + 1, steps_done + 1)} - {row["step"] for row in rows})
    if not missing:
        return ""
    spans: list[tuple[int, int]] = []
    for step in missing:
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    named = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans[:_NAMED_SPANS])
    ending = f" and {len(spans) - _NAMED_SPANS} more places" if len(spans) > _NAMED_SPANS else ""
    noun = "row" if len(missing) == 1 else "rows"
    return (
        f"lacks the {noun} of step {named}{ending} ({len(missing)} of {steps_done - begins_at}), "
        "as a power cut, a full disk or an edit leaves it; the checkpoint has these steps, curves "
        "do not"
    )
