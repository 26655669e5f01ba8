"""`mocov3 stability`: grids of runs, their report, and the runs without one layer group."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mocov3_ds.data import storage
from mocov3_ds.stability.grid_options import GridOptions
from mocov3_ds.stability.trainings import signals_as_interrupts

Name = Annotated[str, tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]
Sources = Annotated[tuple[Path, ...], tyro.conf.Positional]
_GRID_OPTIONS = GridOptions()


def run(
    grid: Name,
    /,
    *,
    options: Annotated[GridOptions, tyro.conf.arg(name="")] = _GRID_OPTIONS,
) -> None:
    """Train every cell of a grid; the same command again goes on where it was stopped.

    Ready grids: paper-batch, paper-lr, paper-optimizer, paper-patch-projection, cures,
    lr-sensitivity, low-noise. Any TOML file is one, too: `mocov3_ds/stability/grid.py` says how.

    Args:
        grid: a ready grid's name, or a TOML file.
        options: scale, data and where to run.
    """
    from mocov3_ds.stability.train_grid import train_grid  # torch takes seconds, help must not

    train_grid(grid, options)


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


def cell(folder: Folder, name: Name, /) -> None:
    """Train one cell of a grid's folder, as a Slurm task does.

    Args:
        folder: folder of the grid.
        name: name of the cell.
    """
    from mocov3_ds.stability.train_grid import train_cell  # as above

    train_cell(folder, name)


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
    from mocov3_ds.stability.study_page import write_study  # as above

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
    from mocov3_ds.stability import counterfactual, executors  # as above

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
