"""The file `metrics.jsonl` of a run: one JSON line a step, the truth about its numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from mocov3_ds.data.storage.atomic import write_text

Row = Mapping[str, Any]
"""JSON values of a step by name; `step` is the number of optimizer steps done"""

_NAMED_SPANS = 8


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, without lines that a kill cut short or a disk damaged.

    Args:
        path: The file, which may not exist yet.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            try:
                row = json.loads(line)  # NaN and Infinity
            except (ValueError, RecursionError):
                continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


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
