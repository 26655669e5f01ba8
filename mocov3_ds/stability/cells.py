"""How does a grid's folder hold its cells, and how is one cell trained?

    FOLDER/grid.json          the cells, their flags, the launcher
    FOLDER/cells/NAME/        run folder of a cell
    FOLDER/logs/NAME.log      what its training printed
    FOLDER/outcomes/NAME.json how it ended; a cell without one is not done
    FOLDER/table.csv          one row a cell

A cell that diverged has ended like any other and stops nothing. The same command again skips what
has ended, continues what was cut short, and tries again what failed.
"""

import dataclasses
import json
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.trainings import run_to_end

TRAIN = Path(__file__).parents[1] / "train.py"
Status = Literal["done", "diverged", "failed", "stopped", "waiting"]
_DIVERGED = 3  # exit status of train.py


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: str
    status: Status
    exit: int
    """exit status of its process"""
    seconds: float
    """time of this attempt"""
    message: str
    """last line that its training printed, where it did not end well"""

    @property
    def ended(self) -> bool:
        """Whether nothing remains to be done for the cell."""
        return self.status in ("done", "diverged")

    def write(self, folder: Path) -> None:
        """Write the outcome into a grid's folder."""
        tree = dataclasses.asdict(self)
        tree["words"] = tree.pop("message")  # the file's key
        write_json(folder / "outcomes" / f"{self.cell}.json", tree)


def read_outcome(folder: Path, name: str) -> Outcome | None:
    """How a cell of a grid's folder ended, None while it has not."""
    path = folder / "outcomes" / f"{name}.json"
    if not path.exists():
        return None
    tree = json.loads(path.read_text())
    return Outcome(message=tree.pop("words"), **tree)


def read_grid_json(folder: Path) -> dict[str, Any]:
    """The `grid.json` of a folder.

    Raises:
        ValueError: the folder has none.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / "grid.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no grid.json; make one with mocov3 stability run GRID."
        ) from None
    return tree


def list_cells(tree: dict[str, Any]) -> list[Cell]:
    """The cells of a `grid.json`, in its order."""
    names = [entry.name for entry in dataclasses.fields(Cell)]
    return [Cell(**{key: cell[key] for key in names}) for cell in tree["cells"].values()]


def cell_command(folder: Path, tree: dict[str, Any], name: str) -> list[str]:
    """Command line that trains a cell; `tree` is the `grid.json` of the grid's folder."""
    launcher = [
        word.format(port=ranks.free_port()) if "{port}" in word else word
        for word in shlex.split(tree["launcher"])
    ]
    run_folder = ["--runs", str((folder / "cells").absolute()), "--name", name]
    return [*launcher, str(TRAIN), *tree["cells"][name]["flags"], *run_folder]


def default_launcher() -> str:
    """`deepspeed` where there is an accelerator, else this Python alone."""
    return "deepspeed --master_port {port}" if devices.has_usable_card() else sys.executable


def run_cell(folder: Path, name: str) -> Outcome:
    """Train one cell of a grid's folder to its end in a process of its own, unless it has ended.

    If this process is interrupted or killed, the training saves and leaves first (`trainings`).
    """
    earlier = read_outcome(folder, name)
    if earlier is not None and earlier.ended:
        return earlier
    tree = read_grid_json(folder)
    log = folder / "logs" / f"{name}.log"
    started = time.perf_counter()
    with log.open("ab") as file:
        begin = file.tell()
        status = run_to_end(cell_command(folder, tree, name), file.fileno())
    printed = log.read_bytes()[begin:].decode(errors="replace")
    outcome = Outcome(
        cell=name,
        status=name_status(folder / "cells" / name, status, printed),
        exit=status,
        seconds=round(time.perf_counter() - started, 1),
        message="" if status == 0 else _last_message(printed),
    )
    outcome.write(folder)
    return outcome


def name_status(run: Path, exit_status: int, printed: str) -> Status:
    """How a training ended, by its run folder, the launcher's exit status and what it printed."""
    if exit_status == 0:
        return "done" if is_finished(run) else "stopped"
    # launchers have exit statuses of their own and name that of the rank
    named = re.search(rf"(exitcode\s*:|return code =)\s*{_DIVERGED}\b", printed)
    return "diverged" if exit_status == _DIVERGED or named else "failed"


def is_finished(run: Path) -> bool:
    """Whether a run folder holds the last step of its schedule."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("epoch")]
    if not rows or not (run / "config.json").exists():
        return False
    epochs = json.loads((run / "config.json").read_text())["config"]["epochs"]
    step, epoch = rows[-1]["step"], rows[-1]["epoch"]
    return bool(step >= max(1, round(epochs * step / epoch)))


def _last_message(printed: str) -> str:
    """The sentence that train.py ended with, else the last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or [""])[-1][:400]


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file of a grid's folder, whole or not at all."""
    atomic.write_text(path, json.dumps(tree, indent=1))
