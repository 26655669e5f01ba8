"""Which arms do runs make that no grid made? Those with equal settings, or names, but for the seed.

Runs of this program are told apart by what differs in their `config.json`; runs of other programs
by the settings beside their logs, or by their names.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mocov3_ds.monitoring.run_facts import flatten_facts
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.logs.find import (
    RunPlace,
    find_runs,
    read_filled_logs,
    read_settings,
    unique_name,
)
from mocov3_ds.stability.logs.foreign import read_foreign_run
from mocov3_ds.stability.logs.table import NothingLoggedError
from mocov3_ds.stability.named_seeds import read_named_seeds
from mocov3_ds.stability.run_commands import repeat_line
from mocov3_ds.stability.run_lengths import RunLength, settle_lengths
from mocov3_ds.stability.study import LoggedRun, Study, gather_arms, judge_cells, read_logged

Facts = Mapping[str, Any]
"""settings of a run by name"""

_NO_SETTING = re.compile(
    r"(name|runs|log|log\..*|save\..*|knn\..*|signals\..*|profile.*|device|version|chunk|hang_.*"
    r"|stop_after.*|data\.(threads|cache.*|shards|probe_shards|images)|evaluate.*|trouble\..*"
    r"|ds\.(train_.*|steps_per_print|wall_clock.*|zero_.*|bf16\..*|fp16\..*|communication.*))",
    re.DOTALL,
)
"""settings of this program's runs that set no arm apart: names, places, speed, what is looked at"""
_NO_FOREIGN_SETTING = re.compile(
    r"(.*[._])?(name|dir|path|folder|file|host\w*|port|rank|gpus?|device|date|time|uuid|id|url"
    r"|resume\w*|workers|output|log\w*)(_.*)?|.*_(name|dir|path|folder|file)",
    re.IGNORECASE | re.DOTALL,
)
_WORDS = {
    "ds.optimizer.params.lr": "lr",
    "ds.optimizer.type": "optimizer",
    "model.patch_lr": "patch",
    "batch": "batch",
}
"""settings of this program -> words of a grid that figures and twins know"""
_MOST_IN_LABEL = 4


@dataclass(frozen=True, eq=False)
class FoundRun:
    """A run with what sets it apart."""

    name: str
    logged: LoggedRun
    facts: Facts
    understood: str = ""
    """how another program's log was read"""
    command: str = ""
    """what trains it again, where that is known"""
    unit: str = "step"
    """what its steps count: "step", "epoch" or "row" """
    is_planned: bool = True
    """whether it is known how long it was to be"""


def read_ordinary_runs(
    sources: Sequence[Path], columns: Sequence[str] = (), probes: int = 0
) -> Study:
    """Read and judge runs of any program, and group them into arms.

    Args:
        sources: run folders, logs, or folders of these.
        columns: MEANING=COLUMN each, for the logs of other programs.
        probes: images that an evaluation classifies, for the logs of other programs.

    Raises:
        ValueError: there is no run, a log cannot be understood, or a flag has no effect.
    """
    places = {
        run_place.path.resolve(): run_place for source in sources for run_place in find_runs(source)
    }
    foreign = [run_place for run_place in places.values() if not run_place.is_own]
    if not foreign and (columns or probes):
        raise ValueError(
            "--columns and --probes are for logs of other programs; these runs are mocov3's own."
        )
    runs, unseen = _read_own([run_place.path for run_place in places.values() if run_place.is_own])
    of_others, left_out = _read_foreign(foreign, columns, probes, [run.name for run in runs])
    runs += of_others
    if not runs:
        raise ValueError(
            f"no run of {', '.join(map(str, sources))} has logged a step yet"
            f"{''.join(f'; {one}' for one in left_out[:1])}."
        )
    runs, of_lengths = _settle_lengths(runs) if of_others else (runs, [])
    cells, notes = group_runs({run.name: run.facts for run in runs})
    judged = judge_cells(cells, {run.name: run.logged for run in runs})
    title = ", ".join(source.resolve().name for source in sources[:3])
    return Study(
        title=title + f" and {len(sources) - 3} more" * (len(sources) > 3),
        about="",
        scale="",
        command="",
        arms=gather_arms(cells, judged),
        unseen=(*unseen, *(f"left out: {one}" for one in left_out), *of_lengths, *notes),
        understood=tuple(run.understood for run in runs if run.understood),
        run_commands=[(run.name, run.command) for run in runs if run.command],
    )


def _read_own(folders: Sequence[Path]) -> tuple[list[FoundRun], list[str]]:
    """This program's runs, and those without a logged step."""
    runs: list[FoundRun] = []
    unseen = []
    for folder in folders:
        name = unique_name(folder.resolve().name, folder, [run.name for run in runs])
        logged = read_logged(folder)
        if logged is None:
            unseen.append(f"{name}: has not logged a step yet")
            continue
        tree = read_settings(folder / "config.json")
        facts = flatten_facts(tree)
        settings = {key: value for key, value in facts.items() if not _NO_SETTING.fullmatch(key)}
        runs.append(FoundRun(name, logged, settings, command=repeat_line(tree)))
    return runs, unseen


def _read_foreign(
    places: Sequence[RunPlace], columns: Sequence[str], probes: int, taken: Sequence[str]
) -> tuple[list[FoundRun], list[str]]:
    """Other programs' runs by names that are not taken, and a clause about each that has no rows.

    Raises:
        ValueError: a log cannot be understood.
    """
    tables, left_out = read_filled_logs(places)
    runs: list[FoundRun] = []
    for table in tables:
        try:
            read = read_foreign_run(table, columns, probes)
        except NothingLoggedError as error:
            left_out.append(str(error).removesuffix("."))
            continue
        name = unique_name(table.name, table.source, [*taken, *(run.name for run in runs)])
        runs.append(
            FoundRun(
                name,
                LoggedRun(read.series),
                _flatten(table.facts),
                read.understood,
                unit=read.unit,
                is_planned=read.is_planned,
            )
        )
    return runs, left_out


def _settle_lengths(runs: Sequence[FoundRun]) -> tuple[list[FoundRun], list[str]]:
    """The runs, those of other programs that were cut short as unfinished, and what is said."""
    settled, notes = settle_lengths(
        [RunLength(run.name, run.logged.series, run.unit, run.is_planned) for run in runs]
    )
    return [
        replace(run, logged=replace(run.logged, series=settled[run.name])) for run in runs
    ], notes


def _flatten(tree: Facts) -> dict[str, Any]:
    """Settings beside another program's log that may set arms apart."""
    facts = {key: value for key, value in flatten_facts({"config": tree}).items() if value != ""}
    return {key: value for key, value in facts.items() if not _NO_FOREIGN_SETTING.fullmatch(key)}


def group_runs(facts: Mapping[str, Facts]) -> tuple[list[Cell], list[str]]:
    """Cells of runs: label of the arm, seed, and twin.

    Args:
        facts: name of a run -> its settings, `seed` among them where it is known.

    Returns:
        A cell for each run, and sentences about what is not known.
    """
    named = read_named_seeds(facts)
    of_settings = {name: _seed_of_settings(run) for name, run in facts.items()}
    seeds = {
        name: named.seeds.get(name) if seed is None else seed for name, seed in of_settings.items()
    }
    settings = {name: {k: v for k, v in run.items() if k != "seed"} for name, run in facts.items()}
    varied = _list_varied(list(settings.values()))
    labels = {
        name: _label_settings({key: run.get(key) for key in varied}) or "all runs"
        for name, run in settings.items()
    }
    notes = named.describe_guesses(name for name, seed in of_settings.items() if seed is None)
    is_known = varied or (any(settings.values()) and None not in seeds.values())
    if not is_known or len(varied) > _MOST_IN_LABEL or _have_doubles(labels, seeds):
        labels = dict(named.stems)
    if _have_doubles(labels, seeds):
        labels = {name: name for name in facts}
    unknown = [name for name, seed in seeds.items() if seed is None]
    if unknown and len(facts) > 1:
        notes.append(
            f"{count_noun(len(unknown), 'run')} {'names' if len(unknown) == 1 else 'name'} no seed,"
            f" so nothing is paired by them: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}"
        )
    first_free = 1 + max((seed for seed in seeds.values() if seed is not None), default=-1)
    numbers = {name: first_free + index for index, name in enumerate(unknown)}
    cells = [
        Cell(
            name=name,
            label=labels[name],
            settings={**_grid_words(settings[name]), "seed": numbers.get(name, seeds[name])},
            varied={key: settings[name].get(key) for key in varied},
        )
        for name in facts
    ]
    return [_link_twin(cell, cells, settings) for cell in cells], notes


def _seed_of_settings(facts: Facts) -> int | None:
    """The seed that the settings tell; None where they do not."""
    seed = facts.get("seed")
    if isinstance(seed, int | float) and not isinstance(seed, bool) and seed == seed // 1:
        return int(seed)
    return None


def _list_varied(settings: Sequence[Facts]) -> list[str]:
    """Settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in settings for key in run)
    return [key for key in keys if len({json.dumps(run.get(key)) for run in settings}) > 1]


def _have_doubles(labels: Mapping[str, str], seeds: Mapping[str, int | None]) -> bool:
    """Whether an arm would have two runs of one seed."""
    pairs = Counter((labels[name], seed) for name, seed in seeds.items() if seed is not None)
    return any(count > 1 for count in pairs.values())


def _label_settings(varied: Facts) -> str:
    """E.g. `lr 0.001, patch 0`; a setting has its last word, if that is its own."""
    shorts = {key: _WORDS.get(key) or key.rpartition(".")[2] for key in varied}
    counts = Counter(shorts.values())
    return ", ".join(
        f"{shorts[key] if counts[shorts[key]] == 1 else key} {'-' if value is None else value}"
        for key, value in varied.items()
    )


def _grid_words(settings: Facts) -> dict[str, Any]:
    """Settings in the words of a grid, as far as figures and twins ask for them."""
    grid_settings = {word: settings[key] for key, word in _WORDS.items() if key in settings}
    if "lr" not in grid_settings and isinstance(settings.get("lr"), int | float):
        grid_settings["lr"] = settings["lr"]
    return grid_settings


def _link_twin(cell: Cell, cells: Sequence[Cell], settings: Mapping[str, Facts]) -> Cell:
    """The cell, with the name of the one that differs by the frozen patch projection alone."""
    twin = {**settings[cell.name], "model.patch_lr": 0.0}
    names = [
        candidate.name
        for candidate in cells
        if "model.patch_lr" in settings[candidate.name]
        and candidate is not cell
        and candidate.seed == cell.seed
        and settings[candidate.name] == twin
    ]
    return replace(cell, twin=names[0]) if names else cell
