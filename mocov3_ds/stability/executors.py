"""Where do the cells of a grid run: on this machine, as a Slurm array, or on a Ray cluster?"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mocov3_ds.data.storage import atomic
from mocov3_ds.stability.cells import Outcome, run_cell
from mocov3_ds.stability.trainings import stop_all

_RETRIES = 3  # of a cell whose Ray node died


def run_here(folder: Path, names: Sequence[str], workers: int) -> Iterator[Outcome]:
    """Train cells of a grid's folder here, `workers` at a time; outcomes come as cells end."""
    if workers <= 1:
        yield from (run_cell(folder, name) for name in names)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(run_cell, folder, name) for name in names]):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        stop_all()  # the threads that wait for the trainings write down how they end
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_on_ray(
    folder: Path, names: Sequence[str], *, cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[Outcome]:
    """Train cells on a Ray cluster, one task a cell; every node sees `folder` under the same path.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, or starts one here.

    Args:
        folder: folder of the grid.
        names: names of the cells.
        cpus: number of CPUs that a cell takes.
        gpus: number of GPUs that a cell takes.

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
            ready, pending = ray.wait(pending)
            yield from ray.get(ready)
    except ray.exceptions.RayError as error:
        reason = f"{error}".partition("\n")[0]
        raise ValueError(
            f"the Ray cluster lost a cell ({reason}); the same command goes on where this one ends."
        ) from None
    finally:
        for reference in pending:
            ray.cancel(reference)


def write_slurm_script(folder: Path, names: Sequence[str], *, at_once: int, options: str) -> Path:
    """Write the script of a Slurm array, one task a cell.

    Args:
        folder: folder of the grid, on a file system that every node sees.
        names: names of the cells.
        at_once: tasks that may run at a time; 0 = as many as Slurm grants.
        options: options of sbatch, e.g. `--partition gpu --gpus-per-node 8 --time 24:00:00`.

    Raises:
        ValueError: folder or options hold what no line of a batch script can say.
    """
    path = folder / "submit.sh"
    literal = str(folder.absolute()).replace("%", "%%")  # a % begins a pattern of Slurm's
    limit = f"%{at_once}" if at_once else ""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={_sbatch_word(f'stability-{folder.name}')}",
        f"#SBATCH --array=0-{len(names) - 1}{limit}",
        f"#SBATCH --output={_sbatch_word(f'{literal}/logs/slurm-%A_%a.log')}",
        "#SBATCH --signal=B:TERM@120",
        *_sbatch_lines(options),
        f"cells=({' '.join(map(shlex.quote, names))})",
        # exec: the signal before the time limit reaches this program, which passes it on
        f"exec {shlex.quote(sys.executable)} -m mocov3_ds.cli stability cell "
        f'{shlex.quote(str(folder.absolute()))} "${{cells[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path


def _sbatch_lines(options: str) -> list[str]:
    try:
        option_words = shlex.split(options)
    except ValueError as error:
        raise ValueError(f"--sbatch {options!r} cannot be read: {error}.") from None
    lines: list[str] = []
    for word in option_words:
        if word.startswith("-") or not lines:
            lines.append(f"#SBATCH {_sbatch_word(word)}")
        else:
            lines[-1] += f" {_sbatch_word(word)}"
    return lines


def _sbatch_word(word: str) -> str:
    """A word as sbatch reads it in a line of a script: in double quotes where it must be.

    Raises:
        ValueError: the word holds a quote, a backslash or a control character.
    """
    if not word.isprintable() or set(word) & {'"', "\\"}:
        raise ValueError(
            f"{word!r} cannot stand in an #SBATCH line; use a folder or an option without quotes, "
            "backslashes and line ends."
        )
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else f'"{word}"'


def submit_script(script: Path) -> str:
    """Hand an array to Slurm where there is one, and tell what happened in a sentence.

    Raises:
        ValueError: sbatch refused the script.
    """
    command = shlex.join(["sbatch", str(script)])
    if shutil.which("sbatch") is None:
        return f"there is no sbatch on this machine; on the cluster: {command}"
    result = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"{command} failed: {result.stderr.strip()}")
    return result.stdout.strip()


def collect_outcomes(outcomes: Iterable[Outcome], total: int, ended: int) -> list[Outcome]:
    """Wait for outcomes under a progress bar over all cells, with a line for each.

    `ended` of the `total` cells had ended before.
    """
    collected = []
    with tqdm(total=total, initial=ended, unit="cell", dynamic_ncols=True) as bar:
        for outcome in outcomes:
            collected.append(outcome)
            bar.update(1)
            reason = f": {outcome.message}" if outcome.message else ""
            tqdm.write(f"{outcome.status} after {outcome.seconds:.0f} s: {outcome.cell}{reason}")
    return collected
