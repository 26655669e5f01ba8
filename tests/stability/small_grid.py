"""A grid of three rates whose trainings are stand-ins, or real and small."""

import shlex
import sys
from pathlib import Path

from mocov3_ds.stability.cell_table import tabulate_cells
from mocov3_ds.stability.grid import lay_out, tomllib
from mocov3_ds.stability.grid_folder import prepare_folder

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_training.py')}"
"""a launcher that does not start train.py: the second rate fails once, the third one diverges"""
RATES = "twins = false\nseeds = 1\n[axes]\nlr = [0.25, 0.5, 2.0]"


def prepare(
    folder: Path, text: str, *, launcher: str = FAKE, extra: tuple[str, ...] = ()
) -> list[str]:
    """Prepare the folder of a grid, and return the names of its cells."""
    grid = lay_out(tomllib.loads(text), "mine", "tiny")
    prepare_folder(folder, grid, launcher=launcher, extra=extra)
    return [cell.name for cell in grid.cells]


def statuses(folder: Path) -> dict[str, str]:
    return {row["cell"]: row["status"] for row in tabulate_cells(folder)}


def count_starts(folder: Path) -> list[int]:
    """How often each cell's training was started."""
    return [len(path.read_text()) for path in sorted(folder.glob("cells/*/starts"))]
