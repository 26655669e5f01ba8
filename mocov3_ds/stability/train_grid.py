"""What does `mocov3 stability run` do? Lays a grid out, trains its cells here or elsewhere."""

import shlex
from pathlib import Path

from mocov3_ds.data import storage
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability import cells, executors, grid_folder
from mocov3_ds.stability.cell_table import format_cells, tabulate_cells, write_cell_table
from mocov3_ds.stability.grid import Grid, load_grid
from mocov3_ds.stability.grid_options import GridOptions
from mocov3_ds.stability.grid_outlook import foresee
from mocov3_ds.stability.trainings import signals_as_interrupts


def train_grid(grid: str, options: GridOptions) -> None:
    """Train every cell of a grid that has not ended, and print what became of all.

    Args:
        grid: a ready grid's name, or a TOML file.
        options: scale, data and where to run.

    Raises:
        ValueError: there is no such grid, it cannot be laid out, or its folder is another's.
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


def train_cell(folder: Path, name: str) -> None:
    """Train one cell of a grid's folder.

    Args:
        folder: folder of the grid.
        name: name of the cell.

    Raises:
        ValueError: there is no such cell.
    """
    names = cells.read_grid_json(folder)["cells"]
    if name not in names:
        raise ValueError(f"{folder} has no cell {name!r}; there are {', '.join(names)}.")
    with signals_as_interrupts():
        outcome = cells.run_cell(folder, name)
    print(f"{outcome.status}: {name}{': ' * bool(outcome.message)}{outcome.message}")
