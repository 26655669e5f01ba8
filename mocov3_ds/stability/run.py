"""Runs a grid's cells: each an ordinary training run in a folder of its own.

    FOLDER/grid.json          the cells, their flags, the launcher
    FOLDER/cells/NAME/        run folder of a cell
    FOLDER/logs/NAME.log      what its training said
    FOLDER/outcomes/NAME.json how it ended; a cell without one is not done
    FOLDER/table.csv          one row a cell

A cell that diverged has ended like any other and stops nothing. The same command again skips what
has ended, continues what was cut short, and tries again what failed.
"""

import csv
import ctypes
import dataclasses
import difflib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import ranks
from mocov3_ds.monitoring.run_log import read_rows
from mocov3_ds.stability.grid import Cell, Grid

TRAIN = Path(__file__).parents[1] / "train.py"
Status = Literal["done", "diverged", "failed", "stopped", "waiting"]
_DIVERGED = 3  # exit status of train.py
_RETRIES = 3  # of a cell whose Ray node died
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: str
    status: Status
    exit: int
    seconds: float
    """of this attempt"""
    words: str
    """last line that its training said, where it did not end well"""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.status in ("done", "diverged")


def prepare(folder: Path, grid: Grid, *, launcher: str, extra: Sequence[str]) -> None:
    """Write down what is to run, or check that the folder is of this grid.

    Cells may be added to a folder (more seeds); none may change.

    Args:
        folder: of the grid.
        grid: its cells.
        launcher: command line before train.py; `{port}` becomes a free port.
        extra: flags of train.py for every cell.

    Raises:
        ValueError: the folder holds another grid.
    """
    path = folder / "grid.json"
    cells = {
        cell.name: {**dataclasses.asdict(cell), "flags": [*cell.flags(), *extra]}
        for cell in grid.cells
    }
    if path.exists():
        before = json.loads(path.read_text())["cells"]
        for name in sorted({*before} & {*cells}):
            theirs, mine = before[name]["flags"], cells[name]["flags"]
            if theirs != mine:
                differing = [f"{a} there, {b} here" for a, b in _pairs(theirs, mine)]
                raise ValueError(
                    f"{folder} holds another grid: cell {name} has {'; '.join(differing[:3])}. "
                    "Give --runs another folder, or move this one away."
                )
        cells = {**before, **cells}
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no grid.json; give --runs another one.")
    tree = {
        "name": grid.name,
        "scale": grid.scale,
        "title": grid.title,
        "about": grid.about,
        "launcher": launcher,
        "cells": cells,
    }
    for part in ("cells", "logs", "outcomes"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _write(path, tree)


def _pairs(theirs: list[str], mine: list[str]) -> Iterator[tuple[str, str]]:
    for tag, a, b, c, d in difflib.SequenceMatcher(None, theirs, mine).get_opcodes():
        if tag != "equal":
            yield shlex.join(theirs[a:b]) or "nothing", shlex.join(mine[c:d]) or "nothing"


def open_grid(folder: Path) -> dict[str, Any]:
    """The `grid.json` of a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / "grid.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no grid.json; make one with mocov3 stability run GRID."
        ) from None
    return tree


def cells_of(tree: dict[str, Any]) -> list[Cell]:
    """The cells of a `grid.json`, in its order."""
    names = [entry.name for entry in dataclasses.fields(Cell)]
    return [Cell(**{key: cell[key] for key in names}) for cell in tree["cells"].values()]


def outcome_of(folder: Path, name: str) -> Outcome | None:
    """How a cell ended, None while it has not."""
    path = folder / "outcomes" / f"{name}.json"
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def command(folder: Path, tree: dict[str, Any], name: str) -> list[str]:
    """Command line of a cell."""
    launcher = [
        word.format(port=ranks.free_port()) if "{port}" in word else word
        for word in shlex.split(tree["launcher"])
    ]
    place = ["--runs", str((folder / "cells").absolute()), "--name", name]
    return [*launcher, str(TRAIN), *tree["cells"][name]["flags"], *place]


def default_launcher() -> str:
    """`deepspeed` where there is an accelerator, else this Python alone."""
    import torch

    return "deepspeed --master_port {port}" if torch.cuda.is_available() else sys.executable


_running: set[subprocess.Popen[bytes]] = set()


def run_cell(folder: Path, name: str) -> Outcome:
    """Train one cell to its end in a process of its own, unless it has ended already.

    If this process is killed, the training gets SIGTERM: it saves and leaves.
    """
    before = outcome_of(folder, name)
    if before is not None and before.ended:
        return before
    tree = open_grid(folder)
    log = folder / "logs" / f"{name}.log"
    started = time.perf_counter()
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command(folder, tree, name),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(_end_with, os.getpid()) if sys.platform == "linux" else None,
        )
        _running.add(process)
        try:
            status = process.wait()
        except BaseException:
            _let_go(process)
            raise
        finally:
            _running.discard(process)
    said = log.read_bytes()[begin:].decode(errors="replace")
    outcome = Outcome(
        cell=name,
        status=_status(folder / "cells" / name, status, said),
        exit=status,
        seconds=round(time.perf_counter() - started, 1),
        words="" if status == 0 else _last_words(said),
    )
    _write(folder / "outcomes" / f"{name}.json", dataclasses.asdict(outcome))
    return outcome


def _end_with(parent: int) -> None:
    """In the new process: SIGTERM when the parent dies, also when it is gone already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Ask a training to save and leave; make it leave after two minutes."""
    process.terminate()
    try:
        process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _status(run: Path, status: int, said: str) -> Status:
    if status == 0:
        return "done" if is_finished(run) else "stopped"
    # launchers have exit statuses of their own and name that of the rank
    named = re.search(rf"(exitcode\s*:|return code =)\s*{_DIVERGED}\b", said)
    return "diverged" if status == _DIVERGED or named else "failed"


def is_finished(run: Path) -> bool:
    """Whether a run folder holds the last step of its schedule."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("epoch")]
    if not rows or not (run / "config.json").exists():
        return False
    epochs = json.loads((run / "config.json").read_text())["config"]["epochs"]
    step, epoch = rows[-1]["step"], rows[-1]["epoch"]
    return bool(step >= max(1, round(epochs * step / epoch)))


def _last_words(said: str) -> str:
    """The sentence that train.py ended with, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line for line in lines if "error:" in line.lower()]
    return (own or lines or [""])[-1][:400]


def _write(path: Path, tree: Any) -> None:
    atomic.write_text(path, json.dumps(tree, indent=1))


# ---------------------------------------------------------------------------------- executors


def here(folder: Path, names: Sequence[str], workers: int) -> Iterator[Outcome]:
    """On this machine, `workers` cells at a time; outcomes as they come."""
    if workers <= 1:
        yield from (run_cell(folder, name) for name in names)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(run_cell, folder, name) for name in names]):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):  # the threads that wait for them write down how they end
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def on_ray(
    folder: Path, names: Sequence[str], *, cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[Outcome]:
    """On a Ray cluster, one task a cell; every node sees `folder` under the same path.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, or starts one here.

    Args:
        folder: of the grid.
        names: of the cells.
        cpus: that a cell takes.
        gpus: that a cell takes.

    Raises:
        ValueError: Ray is not installed, or a cell's node died more often than is tried.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--executor ray needs Ray: pip install 'mocov3-ds[ray]'.") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(run_cell)
    pending = [task.remote(folder.absolute(), name) for name in names]
    try:
        while pending:
            done, pending = ray.wait(pending)
            yield from ray.get(done)
    except ray.exceptions.RayError as error:
        first = f"{error}".partition("\n")[0]
        raise ValueError(
            f"the Ray cluster lost a cell ({first}); the same command goes on where this one ends."
        ) from None
    finally:
        for left in pending:
            ray.cancel(left)


def slurm_script(folder: Path, names: Sequence[str], *, at_once: int, options: str) -> Path:
    """Write the script of a Slurm array, one task a cell.

    Args:
        folder: of the grid, on a file system that every node sees.
        names: of the cells.
        at_once: tasks that may run at a time; 0 = as many as Slurm grants.
        options: of sbatch, e.g. `--partition gpu --gpus-per-node 8 --time 24:00:00`.
    """
    path = folder / "submit.sh"
    limit = f"%{at_once}" if at_once else ""
    array = f"0-{len(names) - 1}{limit}"
    wanted = [
        "#!/bin/bash",
        f"#SBATCH --job-name=stability-{folder.name}",
        f"#SBATCH --array={array}",
        f"#SBATCH --output={folder.absolute()}/logs/slurm-%A_%a.log",
        "#SBATCH --signal=B:TERM@120",
        *_sbatch_lines(options),
        f"cells=({' '.join(map(shlex.quote, names))})",
        # exec: the signal before the time limit reaches this program, which passes it on
        f"exec {shlex.quote(sys.executable)} -m mocov3_ds.cli stability cell "
        f'{shlex.quote(str(folder.absolute()))} "${{cells[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    path.write_text("\n".join(wanted) + "\n")
    return path


def _sbatch_lines(options: str) -> list[str]:
    lines: list[str] = []
    for word in shlex.split(options):
        if word.startswith("-") or not lines:
            lines.append(f"#SBATCH {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def submit(script: Path) -> str:
    """Hand an array to Slurm where there is one, and say what happened."""
    if shutil.which("sbatch") is None:
        return f"there is no sbatch on this machine; on the cluster: sbatch {script}"
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch {script} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def watched(outcomes: Iterable[Outcome], total: int, ended: int) -> list[Outcome]:
    """Collect outcomes under a progress bar over cells."""
    found = []
    say: Callable[[str], None] = tqdm.write
    with tqdm(total=total, initial=ended, unit="cell", dynamic_ncols=True) as bar:
        for outcome in outcomes:
            found.append(outcome)
            bar.update(1)
            words = f": {outcome.words}" if outcome.words else ""
            say(f"{outcome.status} after {outcome.seconds:.0f} s: {outcome.cell}{words}")
    return found


# -------------------------------------------------------------------------------------- table


def table(folder: Path) -> list[dict[str, Any]]:
    """One row a cell from the run folders, without anything that the clock decides.

    `knn` columns are percent: the best and the last dense evaluation, and the full one at the end.
    """
    tree = open_grid(folder)
    rows = []
    for cell in cells_of(tree):
        outcome = outcome_of(folder, cell.name)
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


def write_table(folder: Path) -> Path:
    """Write `table.csv`."""
    rows, path = table(folder), folder / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal, cells under each other."""
    names = ("cell", "status", "steps", "final_loss", "knn_best", "knn_last")
    lines = [list(names), *([_text(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
