"""`mocov3 stability`: grids of runs, their report, and the runs without one layer group."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.data import storage
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import cells, executors, grid_folder
from mocov3_ds.stability.cell_table import format_cells, tabulate_cells, write_cell_table
from mocov3_ds.stability.grid import Grid, Scale, load_grid
from mocov3_ds.stability.grid_outlook import foresee
from mocov3_ds.stability.trainings import signals_as_interrupts

Name = Annotated[str, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]
Sources = Annotated[tuple[Path, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Flags of `mocov3 stability run`."""

    scale: Scale = "tiny"
    """tiny (minutes on a CPU), cifar (a GPU), imagenet (the paper's values)"""
    seeds: int | None = None
    """runs of each cell; empty = as the grid says"""
    executor: Literal["here", "slurm", "ray"] = "here"
    """this machine, a Slurm array (one task a cell), or a Ray cluster (extra [ray])"""
    runs_folder: Annotated[Path, tyro.conf.arg(name="runs")] = Path("runs/stability")
    """the grid's folder is made in here, as GRID-SCALE"""
    shards: str = ""
    """training shards of every cell; empty = drawn sample images (scale tiny)"""
    probes: str = ""
    """labelled held-out shards for the k-NN monitor"""
    launcher: str = ""
    """command line before train.py, e.g. "torchrun --nproc-per-node 8 --master-port {port}" ({port}
    becomes a free one); empty = deepspeed on a GPU, else plain python"""
    flags: str = ""
    """flags of train.py for every cell, in quotes: "--data.threads 2" for example"""
    workers: int = 1
    """cells at a time, here or of the Slurm array (there 0 = no limit)"""
    sbatch: str = ""
    """options for Slurm, in quotes: "--partition gpu --time 24:00:00" for example"""
    cpus: float = 1.0
    """CPUs of a cell on Ray"""
    gpus: float = 0.0
    """GPUs of a cell on Ray"""
    dry_run: bool = False
    """print the command line of each cell, and do nothing"""


def run(
    grid: Name,
    /,
    *,
    options: Annotated[GridOptions, tyro.conf.arg(name="")] = GridOptions(),
) -> None:
    """Train every cell of a grid; the same command again goes on where it was stopped.

    Ready grids: paper-batch, paper-lr, paper-optimizer, paper-patch-projection, cures,
    lr-sensitivity, low-noise. Any TOML file is one, too: `mocov3_ds/stability/grid.py` says how.

    Args:
        grid: a ready grid's name, or a TOML file.
        options: scale, data and where to run.
    """
    study = load_grid(grid, options.scale, options.seeds)
    extra = [*_data_flags(study, options), *shlex.split(options.flags)]
    folder = options.runs_folder / f"{study.name}-{study.scale}"
    launcher = options.launcher or cells.default_launcher()
    print(f"{study.title} at scale {study.scale}, in {folder}")
    print("\n".join(foresee(study, extra).describe()))
    if options.dry_run:
        print(study.about)
        for cell in study.cells:
            command = shlex.join([str(cells.TRAIN), *cell.flags(), *extra])
            print(launcher.replace("{port}", "29500"), command)
        return
    grid_folder.check_folder(folder, study, extra)  # before a file is made in it
    with grid_folder.folder_kept(folder):
        command = _run_command(grid, options)
        grid_folder.prepare_folder(folder, study, launcher=launcher, extra=extra, command=command)
        _run_cells(folder, study, options)


def _run_cells(folder: Path, study: Grid, options: GridOptions) -> None:
    """Train the cells that have not ended, or hand them to Slurm."""
    names = []
    for cell in study.cells:
        outcome = cells.read_outcome(folder, cell.name)
        if outcome is None or not outcome.ended:
            names.append(cell.name)
    print(
        f"{len(names)} of {count_noun(len(study.cells), 'cell')} to run; the time that is left "
        "stands in the bar once the first has ended"
    )
    if options.executor == "slurm" and names:
        script = executors.write_slurm_script(
            folder, names, at_once=options.workers, options=options.sbatch
        )
        print(f"{script}: an array of {len(names)} tasks; {executors.submit_script(script)}")
        print(f"when they have ended: {_report_command(folder)}")
        return
    _train_cells(folder, names, len(study.cells), options)


def _train_cells(folder: Path, names: list[str], total: int, options: GridOptions) -> None:
    """Train cells on this machine or on Ray, and print the table of all cells."""
    with signals_as_interrupts():
        if options.executor == "ray":
            outcomes = executors.run_on_ray(folder, names, cpus=options.cpus, gpus=options.gpus)
        else:
            outcomes = executors.run_here(folder, names, options.workers)
        executors.collect_outcomes(outcomes, total, total - len(names))
    table = write_cell_table(folder)
    print(format_cells(tabulate_cells(folder)))
    print(f"{table}\nreport:   {_report_command(folder)}")


def _run_command(grid: str, options: GridOptions) -> str:
    """Command that trains the same cells, wherever and however many at a time."""
    line = ["mocov3", "stability", "run", grid]
    for name in ("scale", "seeds", "runs", "shards", "probes", "launcher", "flags"):
        field = {"runs": "runs_folder"}.get(name, name)
        value = getattr(options, field)
        if value != getattr(GridOptions(), field):
            line += [f"--{name}", str(value)]
    return storage.hide_secrets(shlex.join(line))


def _page_command(
    sources: Sequence[Path],
    out: Path | None,
    command: str,
    columns: Sequence[str],
    probes: int,
) -> str:
    """Command that makes the same page."""
    line = ["mocov3", "stability", "report", *map(str, sources)]
    line += ["--out", str(out)] if out else []
    line += ["--command", command] if command else []
    line += ["--columns", *columns] if columns else []
    line += ["--probes", str(probes)] if probes else []
    return shlex.join(line)


def _report_command(folder: Path) -> str:
    return shlex.join(["mocov3", "stability", "report", str(folder)])


def _data_flags(grid: Grid, options: GridOptions) -> list[str]:
    """Where the data is, the same from every folder.

    Raises:
        ValueError: a cell needs data and none is given.
    """
    recipes = {cell.settings.get("recipe", "tiny") for cell in grid.cells}
    if not options.shards and recipes != {"tiny"}:
        raise ValueError(
            f"grid {grid.name} at scale {grid.scale} needs images: --shards FOLDER (and --probes "
            "FOLDER for k-NN curves); make the folders with python -m data_prep shard."
        )
    flags = []
    for name, url in (("shards", options.shards), ("probe_shards", options.probes)):
        if url:
            is_local = storage.is_local(url)
            flags += [
                f"--data.{name}",
                str(storage.local_path(url).absolute()) if is_local else url,
            ]
    return flags


def cell(folder: Folder, name: Name, /) -> None:
    """Train one cell of a grid's folder, as a Slurm task does.

    Args:
        folder: folder of the grid.
        name: name of the cell.
    """
    names = cells.read_grid_json(folder)["cells"]
    if name not in names:
        raise ValueError(f"{folder} has no cell {name!r}; there are {', '.join(names)}.")
    with signals_as_interrupts():
        outcome = cells.run_cell(folder, name)
    print(f"{outcome.status}: {name}{': ' * bool(outcome.message)}{outcome.message}")


def report(
    sources: Sources,
    /,
    *,
    out: Path | None = None,
    command: str = "",
    columns: tuple[str, ...] = (),
    probes: int = 0,
) -> None:
    """Draw a page about a grid, or about runs of any program: curves, layers, verdicts, advice.

    Runs that no grid made become arms by the settings in which they differ; equal but for the seed,
    they are one arm, and runs of one seed are pairs. Logs of other programs are read as CSV, JSON
    lines, W&B's exports and TensorBoard's event files; the page says how each was understood.

    Args:
        sources: a grid's folder; or run folders, logs of other programs, and folders of these.
            Runs may still be going on.
        out: folder of the page, the pictures and the tables; empty = SOURCE/report of one folder,
            else stability-report.
        command: command that made the runs, to be printed on the page.
        columns: which column of a log means what where its name does not tell, e.g.
            `knn=val/acc loss=train/loss`; `lr=` leaves one out, `grad.patch_embed=g/conv1` names a
            layer's gradient.
        probes: images that each evaluation of a log classifies, for its error; 0 = unknown.
    """
    from mocov3_ds.stability.study_page import write_study  # matplotlib takes a while

    if not sources:
        raise ValueError("stability report needs a grid's folder, runs or logs.")
    if probes < 0:
        raise ValueError(f"--probes {probes} must be 0 (unknown) or the number of images.")
    alone = sources[0] / "report" if len(sources) == 1 and sources[0].is_dir() else None
    page = write_study(
        sources,
        out or alone or Path("stability-report"),
        command=command,
        columns=columns,
        probes=probes,
        page_command=_page_command(sources, out, command, columns, probes),
    )
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
        run: run folder with the event.
        event: largest, or a step: the event nearest to it.
        factor: rate of the chosen group relative to the run's; 0 = frozen.
        groups: groups to try, e.g. patch_embed block_0; empty = all that are trained.
        launcher: command line before train.py, as the run was started; empty = as for `run`.
        workers: forks at a time.
        out: folder of forks, table and picture; empty = RUN-replay-step-STEP-rate-FACTOR beside
            the run.
    """
    from mocov3_ds.stability import counterfactual  # matplotlib takes a while

    if not 0 <= factor < 1:
        raise ValueError(f"--factor {factor} must be from 0 (frozen) to below 1.")
    options = counterfactual.CounterfactualOptions(
        factor=factor, groups=groups, launcher=launcher, workers=workers
    )
    with signals_as_interrupts():
        answer = counterfactual.repeat_without_groups(
            run,
            counterfactual.choose_event(run, event),
            out,
            options,
            show=lambda outcomes, total: executors.collect_outcomes(outcomes, total, 0),
        )
    print(counterfactual.format_answer(answer))
    print(f"{answer.out / 'replay.png'}\n{answer.out / 'replay.csv'}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "report": report,
    "replay": replay,
    "cell": cell,
}


def _join_values(arguments: list[str]) -> list[str]:
    """`--flags "--batch 8"` as one word, which a parser would take for two options otherwise."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--flags", "--sbatch", "--launcher"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def main(arguments: list[str]) -> int:
    """`mocov3 stability ARGUMENTS`; bad input ends with one sentence and status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="mocov3 stability", args=_join_values(arguments)
        )
    except (ValueError, storage.StorageError) as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mocov3: error: interrupted; the same command continues where this one ended",
            file=sys.stderr,
        )
        return 130
    return 0
