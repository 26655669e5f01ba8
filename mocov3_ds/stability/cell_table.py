"""What has each cell of a grid reached? One row a cell, as CSV and for a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.stability.cells import list_cells, read_grid_json, read_outcome
from mocov3_ds.stability.csv_file import write_csv

_TERMINAL_COLUMNS = ("cell", "status", "steps", "final_loss", "knn_best", "knn_last")


def tabulate_cells(folder: Path) -> list[dict[str, Any]]:
    """One row a cell from the run folders, without anything that the clock decides.

    `knn` columns are percent: the best and the last dense evaluation, and the full one at the end.
    """
    rows = []
    for cell in list_cells(read_grid_json(folder)):
        outcome = read_outcome(folder, cell.name)
        metrics = read_rows(folder / "cells" / cell.name / "metrics.jsonl")
        losses = [row["loss"] for row in metrics if "loss" in row]
        knn = [row["knn"] for row in metrics if "knn" in row]
        full = [row["knn_full"] for row in metrics if "knn_full" in row and row["step"] > 0]
        tail = losses[-max(1, len(losses) // 10) :]
        rows.append(
            {
                "cell": cell.name,
                "label": cell.label,
                "seed": cell.seed,
                "status": outcome.status if outcome else "waiting",
                "steps": metrics[-1]["step"] if metrics else 0,
                "final_loss": sorted(tail)[len(tail) // 2] if tail else None,
                "knn_best": max(knn, default=None),
                "knn_last": knn[-1] if knn else None,
                "knn_full": full[-1] if full else None,
                "twin": cell.twin,
            }
        )
    return rows


def write_cell_table(folder: Path) -> Path:
    """Write `table.csv` into a grid's folder."""
    path = folder / "table.csv"
    write_csv(path, tabulate_cells(folder))
    return path


def format_cells(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal, cells under each other."""
    lines = [
        _TERMINAL_COLUMNS,
        *(tuple(_format_value(row[name]) for name in _TERMINAL_COLUMNS) for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _format_value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
