"""Whose is a grid's folder, and which process trains its cells now?

The grid that made a folder is told by `grid.json` in it: its file, its title and its cells. More
seeds and more arms of that grid are welcome; another grid is not, even where no cell of one has the
name of a cell of the other, as one page would show both as one study.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints.run_folder import find_holder, lock_folder, unlock_folder
from mocov3_ds.settings.comparison import differences
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.cells import write_json
from mocov3_ds.stability.grid import Grid
from mocov3_ds.stability.planned import as_trees

_LOCK = "lock"


def check_folder(folder: Path, grid: Grid, extra: Sequence[str]) -> dict[str, Any]:
    """The cells that a folder holds already; nothing is written.

    Args:
        folder: folder of the grid, which need not exist.
        grid: the grid with its cells.
        extra: flags of train.py for every cell.

    Raises:
        ValueError: the folder holds another grid, or something else.
    """
    path = folder / "grid.json"
    if not path.exists():
        if folder.exists() and any(item.name != _LOCK for item in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no grid.json; give --runs another one."
            )
        return {}
    tree = json.loads(path.read_text())
    earlier: dict[str, Any] = tree["cells"]
    present = {cell.name: [*cell.flags(), *extra] for cell in grid.cells}
    reason = _why_another(tree, grid)
    if reason:
        raise ValueError(
            f"{folder} holds {_name_grid(tree['title'], tree.get('file', ''), len(earlier))}, and "
            f"{_name_grid(grid.title, grid.file, len(present))} is another one: {reason}. Give "
            "--runs another folder, or the file another name."
        )
    for name in sorted({*earlier} & {*present}):
        _check_same_flags(folder, name, earlier[name]["flags"], present[name])
    return earlier


def _why_another(tree: Mapping[str, Any], grid: Grid) -> str:
    """Why the grid of a `grid.json` is not this one; empty where it is.

    A file that was edited is the same grid as long as a cell remains. Of another file, or where the
    file is unknown, the title must be the same; another file must also hold all the cells of the
    folder, or no other ones.
    """
    names, earlier = {cell.name for cell in grid.cells}, {*tree["cells"]}
    if not names & earlier:
        return "they have no cell in common"
    file = tree.get("file", "")
    if file and file == grid.file:
        return ""
    if tree["title"] != grid.title:
        return "they have other titles"
    if file and grid.file and not (names <= earlier or earlier <= names):
        first, second = min(earlier - names), min(names - earlier)
        return f"{first} is a cell of the first alone, {second} of the second"
    return ""


def _name_grid(title: str, file: str, cells: int) -> str:
    origin = f" of {file}" if file else ""
    return f"the grid {title!r}{origin} ({count_noun(cells, 'cell')})"


def prepare_folder(
    folder: Path, grid: Grid, *, launcher: str, extra: Sequence[str], command: str = ""
) -> None:
    """Write down what is to run, or check that the folder belongs to this grid.

    Cells may be added to a folder (more seeds, more arms); none may change.

    Args:
        folder: folder of the grid; it is made if it does not exist.
        grid: the grid with its cells.
        launcher: command line before train.py; `{port}` becomes a free port.
        extra: flags of train.py for every cell.
        command: command that asked for the cells, for the page about them.

    Raises:
        ValueError: the folder holds another grid.
    """
    earlier = check_folder(folder, grid, extra)
    cells = {
        cell.name: {**dataclasses.asdict(cell), "flags": [*cell.flags(), *extra]}
        for cell in grid.cells
    }
    for inner in ("cells", "logs", "outcomes"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    tree = {
        "name": grid.name,
        "file": grid.file,
        "scale": grid.scale,
        "title": grid.title,
        "about": grid.about,
        "launcher": launcher,
        "command": command,
        "comparisons": as_trees(grid.planned),
        "cells": {**earlier, **cells},
    }
    write_json(folder / "grid.json", tree)


@contextlib.contextmanager
def folder_kept(folder: Path) -> Iterator[None]:
    """Within, no other process trains the cells of a grid's folder from one command like this.

    Raises:
        ValueError: another one does; the sentence says which.
    """
    try:
        lock_folder(folder, 0)
    except ValueError:
        holder = find_holder(folder, 0) or "another process"
        raise ValueError(
            f"{folder} is in use by {holder}, which trains its cells. Wait for its end or end it, "
            "or give --runs another folder."
        ) from None
    try:
        yield
    finally:
        unlock_folder(folder)


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
