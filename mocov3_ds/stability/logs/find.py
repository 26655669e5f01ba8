"""Where are the runs? Files and folders of any program, each run with the log that it has."""

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.stability.logs.event_files import PATTERN, read_events
from mocov3_ds.stability.logs.scalar_files import is_scalar_file
from mocov3_ds.stability.logs.table import Column, LoggedTable, NothingLoggedError
from mocov3_ds.stability.logs.text_files import read_csv, read_json

_READERS: dict[str, Callable[[Path], list[LoggedTable]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
}
_NAMES = re.compile(r"log\.txt|trainer_state\.json|.*history.*\.json", re.DOTALL)
"""files of other endings, and of the ending .json, that a folder is looked through for"""
_GENERIC = re.compile(r"(metrics|log|logs|history|progress|trainer_state|wandb-history)\Z")
"""stems that say nothing of the run: it is called after its folder"""
_SETTINGS = ("config.json", "args.json", "hparams.json", "params.json")
_PAGE = ("index.html", "runs.csv", "arms.csv", "events.csv")
"""files of a page that `mocov3 stability report` wrote: tables of runs, no logs"""
_DEEPEST = 4
_MOST_RUNS = 1000


@dataclass(frozen=True)
class RunPlace:
    """A run on disk."""

    path: Path
    """its folder where this program trained it, else its log or the folder of its event files"""
    is_own: bool


def find_runs(source: Path) -> list[RunPlace]:
    """Runs of a file, a run folder, a grid's folder, or a folder of any of these.

    Raises:
        ValueError: there is none, or a folder has logs of several kinds.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist, so it is neither a grid, nor a run, nor a log.")
    places = list(_search(source, _DEEPEST))
    if not places:
        raise ValueError(
            f"{source} holds neither a grid (grid.json) nor a run (config.json with metrics.jsonl) "
            "nor a log as CSV, JSON lines (.jsonl, log.txt), W&B's or Trainer's JSON, or "
            "TensorBoard event files."
        )
    if len(places) > _MOST_RUNS:
        raise ValueError(f"{source} holds {len(places)} runs; {_MOST_RUNS} are compared at most.")
    return places


def _search(path: Path, depth: int) -> Iterator[RunPlace]:
    if path.is_file():
        yield RunPlace(path, False)
        return
    if (path / "config.json").exists() and (path / "metrics.jsonl").exists():
        is_own = _is_own(path / "config.json")
        yield RunPlace(path if is_own else path / "metrics.jsonl", is_own)
        return
    if (path / "grid.json").exists():
        yield from (
            run_place for cell in _folders(path / "cells") for run_place in _search(cell, 1)
        )
        return
    if all((path / name).exists() for name in _PAGE):
        return
    logs = _list_logs(path)
    if logs:
        yield from logs
    elif depth > 0:
        for folder in _folders(path):
            yield from _search(folder, depth - 1)


def _is_own(path: Path) -> bool:
    """Whether a `config.json` is one of this program's."""
    tree = read_settings(path)
    return isinstance(tree.get("config"), dict) and "recipe" in tree["config"]


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.glob("*") if entry.is_dir())


def _list_logs(folder: Path) -> list[RunPlace]:
    """Logs that lie in a folder itself.

    Raises:
        ValueError: they are of several kinds, so that one run may have been logged twice.
    """
    files = sorted(entry for entry in folder.glob("*") if entry.is_file())
    texts = [
        file
        for file in files
        if (file.suffix.lower() in _READERS and file.suffix.lower() != ".json")
        or _NAMES.fullmatch(file.name)
    ]
    kinds = {file.suffix.lower() for file in texts}
    if any(file.match(PATTERN) for file in files):
        kinds.add("TensorBoard event files")
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} has logs of several kinds ({', '.join(sorted(kinds))}), which may be those "
            "of one run; name the files that count."
        )
    return [RunPlace(file, False) for file in texts] or [RunPlace(folder, False)] * bool(kinds)


def read_logs(places: Sequence[RunPlace]) -> list[LoggedTable]:
    """Read the logs of other programs; runs of one name in several charts become one.

    The scalars that TensorBoard's page gives as files of one folder are charts of their run.

    Args:
        places: runs that this program did not train.

    Raises:
        ValueError: a log cannot be read, or has no rows yet.
    """
    tables, left_out = read_filled_logs(places)
    if left_out:
        raise NothingLoggedError(f"{left_out[0]}.")
    return tables


def read_filled_logs(places: Sequence[RunPlace]) -> tuple[list[LoggedTable], list[str]]:
    """Read the logs that have rows, as `read_logs` does; and a clause about each one without.

    Args:
        places: runs that this program did not train.

    Raises:
        ValueError: a log cannot be read.
    """
    tables: dict[str, LoggedTable] = {}
    charts: dict[tuple[str, Path | None], str] = {}  # which run it is of -> what that is called
    left_out = []
    for log_place in places:
        try:
            log_tables = _read_log(log_place.path)
        except NothingLoggedError as error:
            left_out.append(str(error).removesuffix("."))
            continue
        for table in log_tables:
            source = table.source
            key = (table.name, source.parent if is_scalar_file(source) else None)
            if table.is_chart and key in charts:
                tables[charts[key]] = _join_charts(tables[charts[key]], table)
                continue
            name = unique_name(table.name, _named_path(source), tables)
            tables[name] = replace(table, name=name)
            if table.is_chart:
                charts[key] = name
    return list(tables.values()), left_out


def unique_name(name: str, path: Path, taken: Collection[str]) -> str:
    """A run's name with as many of its folders before it as make it differ from those taken.

    Args:
        name: name of the run.
        path: file or folder that it is called after.
        taken: names of other runs.
    """
    for parent in path.resolve().parents:
        if name not in taken:
            return name
        name = f"{parent.name}/{name}"
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(candidate for candidate in numbered if candidate not in taken)


def _read_log(path: Path) -> list[LoggedTable]:
    if path.is_dir():
        tables = [read_events(path, sorted(path.glob(PATTERN)))]
    elif path.match(PATTERN):
        tables = [read_events(path, [path])]
    else:
        tables = _READERS.get(path.suffix.lower(), read_json)(path)
    folder = path if path.is_dir() else path.parent
    facts = next((tree for name in _SETTINGS if (tree := read_settings(folder / name))), {})
    named = _named_path(path)
    name = named.name if named.is_dir() else named.stem
    return [
        replace(table, name=table.name if table.is_chart else name, facts=facts) for table in tables
    ]


def _named_path(path: Path) -> Path:
    """What a log's run is called after: the file, or its folder where its name says nothing."""
    path = path.resolve()
    return path.parent if path.is_file() and _GENERIC.match(path.stem) else path


def read_settings(path: Path) -> dict[str, Any]:
    """An object in a JSON file; empty where there is none."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _join_charts(first: LoggedTable, second: LoggedTable) -> LoggedTable:
    """One run of two charts: the rows of the second come after those of the first."""
    columns = dict(first.columns)
    for name, column in second.columns.items():
        moved = Column(column.rows_M + first.rows, column.values_M)
        if name in columns:
            earlier = columns[name]
            moved = Column(
                np.concatenate([earlier.rows_M, moved.rows_M]),
                np.concatenate([earlier.values_M, moved.values_M]),
            )
        columns[name] = moved
    notes = [*first.notes, *second.notes, f"charts {first.source.name} and {second.source.name}"]
    return replace(first, columns=columns, rows=first.rows + second.rows, notes=notes)
