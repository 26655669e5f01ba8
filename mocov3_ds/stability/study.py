"""What did the runs of a study do? The runs of a grid, or one run, read and judged."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mocov3_ds.monitoring import signal_file
from mocov3_ds.monitoring.signal_file import SignalTable
from mocov3_ds.optim.build import find_optimizer
from mocov3_ds.stability.cells import list_cells, read_grid_json, read_outcome
from mocov3_ds.stability.events import loss_excess, loss_ratio, plain_jumps
from mocov3_ds.stability.findings import Array, Judgement, LossEvent, Series
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.other_arms import place_beside_others
from mocov3_ds.stability.planned import PlannedComparison, read_planned
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.verdict import judge


@dataclass(frozen=True, eq=False)
class JudgedRun:
    """A run of a study with its series and its judgement."""

    cell: Cell
    series: Series
    judgement: Judgement
    signals: SignalTable | None
    """all signals of the run; None where it logged none"""
    optimizer: str = ""
    """type of the optimizer in the run's DeepSpeed config"""

    @property
    def has_trust_ratio(self) -> bool:
        """Whether the run's optimizer scales each tensor's step by a trust ratio."""
        optimizer = find_optimizer(self.optimizer)
        return optimizer is not None and optimizer.has_trust_ratio

    @property
    def has_no_network(self) -> bool:
        """Whether it stopped at a value that was not finite, so that its network guesses.

        Before its first evaluation as well, where it is known what guessing gives.
        """
        is_evaluated = len(self.series.knn_K) > 0 or self.series.knn_chance > 0
        return self.series.stopped_non_finite and is_evaluated

    @cached_property
    def loss_excess(self) -> Array:
        """How far the loss is above its trailing median in percent, (T,)."""
        return loss_excess(self.series, self._loss_ratio)

    @cached_property
    def jumps(self) -> Sequence[LossEvent]:
        """Plain jumps of the loss (`events.plain_jumps`)."""
        return plain_jumps(self.series, self._loss_ratio)

    @cached_property
    def _loss_ratio(self) -> Array:
        return loss_ratio(self.series)


Arms = Mapping[str, Sequence[JudgedRun]]
"""label of an arm -> its runs, one a seed"""


@dataclass(frozen=True)
class Study:
    """What a page is about.

    Attributes:
        title: title of the page.
        about: what the grid asks.
        scale: scale of the grid; empty for a single run.
        command: command that made the runs.
        arms: label of an arm -> the runs of all seeds.
        unseen: cells without a logged step, with what is known of them.
        understood: how the logs of other programs were read, a sentence each.
        run_commands: name of a run, and the command that trains it again.
        planned: comparisons that the grid's file plans.
        seeds: seeds that the grid plans.
    """

    title: str
    about: str
    scale: str
    command: str
    arms: Arms
    unseen: tuple[str, ...]
    understood: tuple[str, ...] = ()
    run_commands: Sequence[tuple[str, str]] = ()
    planned: Sequence[PlannedComparison] = ()
    seeds: int = 0


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """A run as it was logged, before it is judged."""

    series: Series
    signals: SignalTable | None = None
    optimizer: str = ""
    """type of the optimizer in the run's DeepSpeed config"""


def read_study(source: Path) -> Study:
    """Read and judge the runs of a grid, or one run.

    Args:
        source: folder of a grid, or a run folder.

    Raises:
        ValueError: it is neither, or nothing is logged yet.
    """
    if (source / "grid.json").exists():
        return _read_grid(source)
    if not (source / "config.json").exists():
        raise ValueError(f"{source} holds neither a grid (grid.json) nor a run (config.json).")
    cell = Cell(source.resolve().name, source.resolve().name, {"seed": 0}, {})
    logged = read_logged(source)
    if logged is None:
        raise ValueError(f"run {source} has not logged a step yet.")
    runs = judge_cells([cell], {cell.name: logged})
    return Study(cell.name, "", "", "", gather_arms([cell], runs), ())


def _read_grid(folder: Path) -> Study:
    tree = read_grid_json(folder)
    cells = list_cells(tree)
    logged = {cell.name: read_logged(folder / "cells" / cell.name) for cell in cells}
    runs = judge_cells(cells, {name: run for name, run in logged.items() if run is not None})
    unseen = []
    for cell in cells:
        outcome = read_outcome(folder, cell.name)
        if cell.name not in runs or outcome is None or outcome.status in ("failed", "stopped"):
            status = outcome.status if outcome else "not ended"
            reason = f": {outcome.message}" if outcome and outcome.message else ""
            unseen.append(f"{cell.name}: {status}{reason}")
    if not runs:
        raise ValueError(f"no cell of {folder} has logged a step yet.")
    arms = gather_arms(cells, runs)
    command = str(tree.get("command") or "")  # folders had none at first
    study = Study(tree["title"], tree["about"], tree["scale"], command, arms, tuple(unseen))
    planned = read_planned(tree.get("comparisons"), [*dict.fromkeys(cell.label for cell in cells)])
    seeds = len({cell.seed for cell in cells})
    return dataclasses.replace(study, planned=planned, seeds=seeds)


def judge_cells(cells: Sequence[Cell], logged: Mapping[str, LoggedRun]) -> dict[str, JudgedRun]:
    """Judge runs, each beside its twin and the best other arm at its seed.

    Args:
        cells: what is known of each run.
        logged: name of a cell -> its run; cells without one are left out.
    """
    placed = place_beside_others(cells, logged)
    return {
        cell.name: JudgedRun(
            cell,
            placed[cell.name],
            judge(placed[cell.name]),
            logged[cell.name].signals,
            logged[cell.name].optimizer,
        )
        for cell in cells
        if cell.name in placed
    }


def gather_arms(cells: Sequence[Cell], runs: Mapping[str, JudgedRun]) -> Arms:
    """The runs of each arm, in the order of the cells."""
    arms: dict[str, list[JudgedRun]] = {}
    for cell in cells:
        if cell.name in runs:
            arms.setdefault(cell.label, []).append(runs[cell.name])
    return arms


def read_logged(folder: Path) -> LoggedRun | None:
    """Read a run folder; None where it has not logged a step."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.json").exists() or not has_loss(metrics):
        return None
    signals = None
    if (folder / "signals.json").exists():
        # apart from what the series is read from: pages of the file that nobody asks for stay out
        signals = signal_file.read_signals(folder)
    return LoggedRun(read_series(folder), signals, _read_optimizer(folder))


def has_loss(metrics: Path) -> bool:
    """Whether a `metrics.jsonl` has a row of a step."""
    if not metrics.exists():
        return False
    with metrics.open("rb") as file:
        return any(b'"loss"' in line for line in file)


def _read_optimizer(run: Path) -> str:
    """Type of a run's optimizer; empty where its config does not tell."""
    tree = json.loads((run / "config.json").read_text())
    return str((tree.get("deepspeed", {}).get("optimizer") or {}).get("type", ""))
