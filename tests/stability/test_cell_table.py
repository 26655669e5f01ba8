"""The table of a grid's cells: from the run folders alone, as CSV and as text."""

from pathlib import Path

from mocov3_ds.stability.cell_table import format_cells, tabulate_cells, write_cell_table
from mocov3_ds.stability.executors import run_here
from tests.stability.small_grid import RATES, prepare


def test_a_row_a_cell(tmp_path: Path) -> None:
    names = prepare(tmp_path, RATES)
    for _ in range(2):  # the second cell fails once
        list(run_here(tmp_path, names, 1))
    rows = {row["cell"]: row for row in tabulate_cells(tmp_path)}
    assert (rows[names[1]]["steps"], rows[names[1]]["final_loss"]) == (3, 0.5)
    assert rows[names[1]]["knn_best"] == rows[names[1]]["knn_last"] == 40.5
    assert rows[names[2]]["steps"] == 1
    lines = write_cell_table(tmp_path).read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("cell,label,seed,status,steps")


def test_columns_stand_under_each_other(tmp_path: Path) -> None:
    names = prepare(tmp_path, RATES)
    list(run_here(tmp_path, names[:1], 1))
    lines = format_cells(tabulate_cells(tmp_path)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["cell", "status", "steps", "final_loss", "knn_best", "knn_last"]
    assert lines[1].split() == [names[0], "done", "3", "0.250", "40.250", "40.250"]
    assert lines[2].split() == [names[1], "waiting", "0", "-", "-", "-"]
