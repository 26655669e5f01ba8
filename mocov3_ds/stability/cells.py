"""How does a grid's folder hold its cells, and how is one cell trained?

    FOLDER/grid.json          the cells, their flags, the launcher
    FOLDER/cells/NAME/        run folder of a cell
    FOLDER/logs/NAME.log      what its training printed
    FOLDER/outcomes/NAME.json how it ended; a cell without one is not done
    FOLDER/table.csv          one row a cell

A cell that diverged has ended like any other and stops nothing. The same command again skips what
has ended, continues what was cut short, and tries again what failed.
"""

import ctypes
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.settings.comparison import differences
from mocov3_ds.stability.grid import Cell, Grid
from mocov3_ds.stability.planned import as_trees

TRAIN = Path(__file__).parents[1] / "train.py"
Status = Literal["done", "diverged", "failed", "stopped", "waiting"]
_DIVERGED = 3  # exit status of train.py
_PR_SET_PDEATHSIG = 1
_SECONDS_TO_SAVE = 120


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
        _write_json(folder / "outcomes" / f"{self.cell}.json", tree)


def read_outcome(folder: Path, name: str) -> Outcome | None:
    """How a cell of a grid's folder ended, None while it has not."""
    path = folder / "outcomes" / f"{name}.json"
    if not path.exists():
        return None
    tree = json.loads(path.read_text())
    return Outcome(message=tree.pop("words"), **tree)


def prepare_folder(
    folder: Path, grid: Grid, *, launcher: str, extra: Sequence[str], command: str = ""
) -> None:
    """Write down what is to run, or check that the folder belongs to this grid.

    Cells may be added to a folder (more seeds); none may change.

    Args:
        folder: folder of the grid; it is made if it does not exist.
        grid: the grid with its cells.
        launcher: command line before train.py; `{port}` becomes a free port.
        extra: flags of train.py for every cell.
        command: command that asked for the cells, for the page about them.

    Raises:
        ValueError: the folder holds another grid.
    """
    path = folder / "grid.json"
    cells = {
        cell.name: {**dataclasses.asdict(cell), "flags": [*cell.flags(), *extra]}
        for cell in grid.cells
    }
    if path.exists():
        earlier = json.loads(path.read_text())["cells"]
        for name in sorted({*earlier} & {*cells}):
            _check_same_flags(folder, name, earlier[name]["flags"], cells[name]["flags"])
        cells = {**earlier, **cells}
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no grid.json; give --runs another one.")
    for inner in ("cells", "logs", "outcomes"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    tree = {
        "name": grid.name,
        "scale": grid.scale,
        "title": grid.title,
        "about": grid.about,
        "launcher": launcher,
        "command": command,
        "comparisons": as_trees(grid.planned),
        "cells": cells,
    }
    _write_json(path, tree)


def _check_same_flags(folder: Path, name: str, earlier: list[str], present: list[str]) -> None:
    if earlier != present:
        changes = list(differences(_values_by_flag(earlier), _values_by_flag(present)))
        raise ValueError(
            f"{folder} holds another grid: cell {name} has other flags: "
            f"{'; '.join(changes[:3]) or 'their order'}. Give --runs another folder, or move this "
            "one away."
        )


def _values_by_flag(flags: Sequence[str]) -> dict[str, str]:
    """Flags as a mapping; values of `--ds` go by the key that they set, e.g. `--ds optimizer`."""
    values: dict[str, str] = {}
    flag = ""
    for word in flags:
        if word.startswith("--"):
            flag = word
            values.setdefault(flag, "")
        elif flag == "--ds":
            key, _, value = word.partition("=")
            values[f"--ds {key}"] = value
        else:
            values[flag] = f"{values.get(flag, '')} {word}".strip()
    return values


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


_running: set[subprocess.Popen[bytes]] = set()
"""trainings of this process; all of them are told to stop when it is interrupted"""


def run_cell(folder: Path, name: str) -> Outcome:
    """Train one cell of a grid's folder to its end in a process of its own, unless it has ended.

    If this process is killed, the training gets SIGTERM: it saves and leaves.
    """
    earlier = read_outcome(folder, name)
    if earlier is not None and earlier.ended:
        return earlier
    tree = read_grid_json(folder)
    log = folder / "logs" / f"{name}.log"
    started = time.perf_counter()
    with log.open("ab") as file:
        begin = file.tell()
        status = _train(cell_command(folder, tree, name), file.fileno())
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


def _train(command: list[str], output: int) -> int:
    """Exit status of a training, whose output goes to an open file."""
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
    )
    try:
        _running.add(process)
        return process.wait()
    except BaseException:
        _stop_process(process)
        raise
    finally:
        _running.discard(process)


def _die_with(parent: int) -> None:
    """In the new process: SIGTERM when the parent dies, also when it is dead already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a training to save and leave; kill it after two minutes."""
    process.terminate()
    try:
        process.wait(_SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def terminate_all() -> None:
    """Ask every training of this process to save and leave, without waiting for it."""
    for process in list(_running):
        process.terminate()


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


def _write_json(path: Path, tree: Any) -> None:
    atomic.write_text(path, json.dumps(tree, indent=1))
