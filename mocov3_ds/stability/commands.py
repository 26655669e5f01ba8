"""`mocov3 stability`: grids of runs, their report, and the replay of an event."""

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.stability import grid as grids
from mocov3_ds.stability import run as runs

Name = Annotated[str, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]


def run(
    grid: Name,
    /,
    *,
    scale: grids.Scale = "tiny",
    seeds: int | None = None,
    executor: Literal["here", "slurm", "ray"] = "here",
    runs_folder: Annotated[Path, tyro.conf.arg(name="runs")] = Path("runs/stability"),
    shards: str = "",
    probes: str = "",
    launcher: str = "",
    flags: str = "",
    workers: int = 1,
    sbatch: str = "",
    cpus: float = 1.0,
    gpus: float = 0.0,
    dry_run: bool = False,
) -> None:
    """Train every cell of a grid; the same command again goes on where it was stopped.

    Ready grids: paper-batch, paper-lr, paper-optimizer, paper-patch-projection, cures,
    lr-sensitivity, low-noise. Any TOML file is one, too: `mocov3_ds/stability/grid.py` says how.

    Args:
        grid: a ready grid's name, or a TOML file.
        scale: tiny (minutes on a CPU), cifar (a GPU), imagenet (the paper's values).
        seeds: runs of each cell; empty = as the grid says.
        executor: this machine, a Slurm array (one task a cell), or a Ray cluster (extra [ray]).
        runs_folder: the grid's folder is made in here, as GRID-SCALE.
        shards: training shards of every cell; empty = drawn sample images (scale tiny).
        probes: labelled held-out shards for the k-NN monitor.
        launcher: command line before train.py, e.g. "torchrun --nproc-per-node 8 --master-port
            {port}" ({port} becomes a free one); empty = deepspeed on a GPU, else plain python.
        flags: of train.py for every cell, e.g. "--data.threads 2".
        workers: cells at a time, here or of the Slurm array (there 0 = no limit).
        sbatch: options for Slurm, e.g. "--partition gpu --gpus-per-node 8 --time 24:00:00".
        cpus: of a cell on Ray.
        gpus: of a cell on Ray.
        dry_run: print the command line of each cell, and do nothing.
    """
    plan = grids.load(grid, scale, seeds)
    extra = [*_data_flags(plan, shards, probes), *shlex.split(flags)]
    folder = runs_folder / f"{plan.name}-{plan.scale}"
    if dry_run:
        print(f"{plan.title} at scale {scale}: {len(plan.cells)} cells in {folder}")
        for cell in plan.cells:
            print(launcher or "LAUNCHER", shlex.join(["train.py", *cell.flags(), *extra]))
        return
    runs.prepare(folder, plan, launcher=launcher or runs.default_launcher(), extra=extra)
    outcomes = [runs.outcome_of(folder, cell.name) for cell in plan.cells]
    left = [
        cell.name
        for cell, outcome in zip(plan.cells, outcomes, strict=True)
        if outcome is None or not outcome.ended
    ]
    print(f"{plan.title} ({scale}): {len(left)} of {len(plan.cells)} cells to run in {folder}")
    if executor == "slurm" and left:
        script = runs.slurm_script(folder, left, at_once=workers, options=sbatch)
        print(f"{script}: an array of {len(left)} tasks; {runs.submit(script)}")
        print(f"when they have ended: mocov3 stability report {folder}")
        return
    with _sigterm_as_interrupt():
        found = (
            runs.on_ray(folder, left, cpus=cpus, gpus=gpus)
            if executor == "ray"
            else runs.here(folder, left, workers)
        )
        runs.watched(found, len(plan.cells), len(plan.cells) - len(left))
    table = runs.write_table(folder)
    print(runs.as_text(runs.table(folder)))
    print(f"{table}\nreport:   mocov3 stability report {folder}")


def _data_flags(plan: grids.Grid, shards: str, probes: str) -> list[str]:
    """Where the data is, the same from every folder.

    Raises:
        ValueError: a cell needs data and none is given.
    """
    recipes = {cell.settings.get("recipe", "tiny") for cell in plan.cells}
    if not shards and recipes != {"tiny"}:
        raise ValueError(
            f"grid {plan.name} at scale {plan.scale} needs images: --shards FOLDER (and --probes "
            "FOLDER for k-NN curves); make the folders with python -m data_prep shard."
        )
    found = []
    for name, url in (("shards", shards), ("probe_shards", probes)):
        if url:
            found += [f"--data.{name}", url if "://" in url else str(Path(url).absolute())]
    return found


def cell(folder: Folder, name: Name, /) -> None:
    """Train one cell of a grid's folder, as a Slurm task does.

    Args:
        folder: of the grid.
        name: of the cell.
    """
    known = runs.open_grid(folder)["cells"]
    if name not in known:
        raise ValueError(f"{folder} has no cell {name!r}; there are {', '.join(known)}.")
    with _sigterm_as_interrupt():
        outcome = runs.run_cell(folder, name)
    print(f"{outcome.status}: {name}{': ' * bool(outcome.words)}{outcome.words}")


def report(source: Folder, /, *, out: Path | None = None, command: str = "") -> None:
    """Draw a page about a grid, or about one run: curves, layers, alarms, verdicts, what to try.

    Args:
        source: folder of a grid, or a run folder; runs may still be going on.
        out: folder of the page, the pictures and the tables; empty = SOURCE/report.
        command: that made the runs, to be printed on the page.
    """
    from mocov3_ds.stability.study_page import report as make_report  # matplotlib takes a while

    page = make_report(source, out or source / "report", command=command)
    print(f"{page}: open it in a browser; runs.csv, arms.csv, events.csv and PNGs lie beside it")


def replay(
    run: Folder,
    event: Annotated[str, tyro.conf.Positional] = "largest",
    /,
    *,
    factor: float = 0.0,
    groups: tuple[str, ...] = (),
    launcher: str = "",
    workers: int = 1,
    out: Path | None = None,
) -> None:
    """Go back before an event and live through it with one layer group frozen at a time.

    The group without which the event does not come is named. Checkpoints near the event help
    (--save.keep_every 50); without one, the run is repeated up to there first.

    Args:
        run: run folder.
        event: largest, or a step: the event nearest to it.
        factor: rate of the chosen group relative to the run's; 0 = frozen.
        groups: to try, e.g. patch_embed block_0; empty = all that are trained.
        launcher: command line before train.py, as the run was started; empty = as for `run`.
        workers: forks at a time.
        out: folder of forks, table and picture; empty = RUN-replay-step-STEP-rate-FACTOR beside
            the run.
    """
    from mocov3_ds.stability import counterfactual as replays

    if not 0 <= factor < 1:
        raise ValueError(f"--factor {factor} must be from 0 (frozen) to below 1.")
    with _sigterm_as_interrupt():
        answer = replays.replay(
            run,
            event,
            out,
            factor=factor,
            groups=groups,
            launcher=launcher,
            watch=lambda outcomes, total: runs.watched(outcomes, total, 0),
            workers=workers,
        )
    print(replays.as_text(answer))
    print(f"{answer.out / 'replay.png'}\n{answer.out / 'replay.csv'}")


class _sigterm_as_interrupt:  # noqa: N801 - reads as a statement
    """Inside, SIGTERM ends this program as Ctrl-C does: the cells save and leave first."""

    def __enter__(self) -> None:
        self._before: Any = signal.signal(signal.SIGTERM, _interrupt)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "report": report,
    "replay": replay,
    "cell": cell,
}


def _joined(arguments: list[str]) -> list[str]:
    """`--flags "--batch 8"` as one word, which a parser would take for two options otherwise."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in ("--flags", "--sbatch", "--launcher"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def main(arguments: list[str]) -> int:
    """`mocov3 stability ARGUMENTS`; bad input ends with one sentence and status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="mocov3 stability", args=_joined(arguments)
        )
    except ValueError as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mocov3: error: interrupted; the same command continues where this one ended",
            file=sys.stderr,
        )
        return 130
    return 0
