"""Which folder of an image's path is its class? The first one, unless another reading is as good.

`ImageFolder` takes the first folder below the root. That is wrong in silence where the root lies
higher: `flowers/cat/0.jpg`, `part0/cat/0.jpg` beside `part1/cat/1.jpg`, `train/cat/0.jpg`. Here
such paths are refused with the readings that are possible, and `--class-level` decides.

    none       images have no class by their path
    archive    the name of the archive that holds the image
    1, 2, ...  the folder so many steps from the top of the source (below --under) or archive
    own        the folder that the image lies in

Paths are folders as tuples of names, `("flowers", "cat")`; () = an image without a folder.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from data_prep.member_names import join_names, normalize_name, quote_name
from data_prep.splits import sibling_splits

LEVELS = "none, archive, own, or a number from 1"
SYNSET = re.compile(r"n\d{8}")

Folders = tuple[str, ...]


@dataclass(frozen=True)
class PathFacts:
    """What is known of the paths of a source's images."""

    folders: Mapping[tuple[int, Folders], int]
    """number of images by archive (-1 = a file of its own) and folders in it"""
    archives: Sequence[str]
    """names of the archives without their endings"""


def check_level(level: str) -> None:
    """Refuse a `--class-level` that is none.

    Raises:
        ValueError: It is not one of `LEVELS`.
    """
    if level not in ("", "none", "archive", "own") and not re.fullmatch("[1-9][0-9]?", level):
        raise ValueError(f"--class-level {level!r} is not one of: {LEVELS}.")


def class_at_level(level: str, folders: Folders, archive: str) -> str | None:
    """Class of an image; None = it has none.

    Args:
        level: Level of the class, one of `LEVELS`.
        folders: Folders of the image's path.
        archive: Name of the archive that holds it, without endings; empty = none.
    """
    if level == "archive":
        name = archive
    elif level == "none" or not folders:
        return None
    elif level == "own":
        name = folders[-1]
    elif len(folders) < int(level):
        return None
    else:
        name = folders[int(level) - 1]
    return name or None


def choose_level(facts: PathFacts, classes: Collection[str], source: str) -> str:
    """Find the level of the path that is the class, where only one reading is sensible.

    Args:
        facts: Paths of the images.
        classes: Class names that the user gave; empty = none.
        source: Name of the source, for messages.

    Returns:
        One of `LEVELS`.

    Raises:
        ValueError: The paths hold splits, or several levels may be the class.
    """
    paths = {folders for _, folders in facts.folders}
    if paths == {()}:
        return _level_of_flat_images(facts, source)
    shared = _shared_folders(paths)
    depth = min(map(len, paths))
    check_splits(paths, source)
    if () in paths:
        return "1"
    names = [_names_at(paths, level) for level in range(1, depth + 1)]
    named = _level_of_names(names, classes)
    if named:
        return named
    if len(paths) == 1:
        _check_archive_names(facts, source, [*next(iter(paths))])
    if shared and any(len(folders) > shared for folders in paths):
        deeper_names = _names_at(paths, shared + 1)
        if len(deeper_names) > 1:
            raise ValueError(_describe_choice(paths, source, [1, shared + 1], shared))
    elif not shared and depth > 1 and (_recur(paths) or _are_wrappers(facts)):
        raise ValueError(_describe_choice(paths, source, [1, 2], 0))
    return "1"


def check_splits(paths: Collection[Folders], source: str) -> None:
    """Refuse images whose folders are splits, in the first folders that differ or the next ones.

    Raises:
        ValueError: They are.
    """
    shared = _shared_folders(paths)
    shared_path = next(iter(paths))[:shared]
    splits = sibling_splits(_names_at(paths, shared + 1))
    if splits:
        root = "/".join([*shared_path, splits[0]])
        raise ValueError(
            f"{source} holds splits ({join_names(splits)}), not classes; shard each by itself "
            f"with --under {_quote_flag(root)} --split {_quote_flag(splits[0])} (or, if they are "
            f"classes: --class-level {shared + 1})."
        )
    tops: dict[str, set[str]] = {}
    for folders in paths:
        if len(folders) > shared + 1:
            tops.setdefault(folders[shared], set()).add(folders[shared + 1])
    inner = {name for names in tops.values() for name in sibling_splits(names)}
    if inner:
        name = min(inner)
        pattern = "/".join([*shared_path, "*", name, "*"])
        raise ValueError(
            f"{source} holds splits ({join_names(sorted(inner))}) in its folders "
            f"({join_names(sorted(tops))}); take one of them with --files '{pattern}' --split "
            f"{_quote_flag(name)}, or all images together with --class-level {shared + 1}."
        )


def find_empty_classes(
    level: str,
    folders: Iterable[Folders],
    used: Collection[Folders],
    others: Iterable[Folders] = (),
) -> list[str]:
    """Class folders in which no image lies, by name.

    Args:
        level: Level of the class, one of `LEVELS`.
        folders: All folders of the source that are not hidden.
        used: Folders that hold images.
        others: Folders that hold files of other kinds, and are no emptied classes.
    """
    if not level.isdigit():
        return []
    depth = int(level)
    parents = {path[: depth - 1] for path in used}
    names = {path[depth - 1] for path in used if len(path) >= depth}
    names |= {normalize_name(name) for name in names}
    busy = {path[:depth] for path in others}
    candidates = {
        path[depth - 1]
        for path in folders
        if len(path) >= depth and path[: depth - 1] in parents and path[:depth] not in busy
    }
    return sorted(name for name in candidates if normalize_name(name) not in names)


def _level_of_flat_images(facts: PathFacts, source: str) -> str:
    """Level of images that lie in no folder: the archive's name may be the class."""
    used = _used_archives(facts)
    if used and all(SYNSET.fullmatch(name) for name in used):
        return "archive"
    _check_archive_names(facts, source, [])
    return "none"


def _used_archives(facts: PathFacts) -> list[str]:
    return [facts.archives[number] for number in sorted({n for n, _ in facts.folders if n >= 0})]


def _check_archive_names(facts: PathFacts, source: str, folders: Sequence[str]) -> None:
    """Refuse images of one folder, or none, in archives whose names may be the classes.

    Args:
        facts: Paths of the images.
        source: Name of the source, for messages.
        folders: The one path of folders that all images have; [] = none.

    Raises:
        ValueError: The names differ by more than their digits.
    """
    used = _used_archives(facts)
    if len({re.sub(r"\d+", "", name) for name in used}) < 2:
        return
    where = f"one folder ({quote_name('/'.join(folders))}) of" if folders else "no folders but in"
    last = f", --class-level 1 if all are {quote_name(folders[0])}" if folders else ""
    raise ValueError(
        f"the images of {source} lie in {where} archives of different names "
        f"({join_names(sorted(used))}): add --class-level archive if these are the classes{last}, "
        "or --class-level none if the images have none."
    )


def _level_of_names(names: Sequence[set[str]], classes: Collection[str]) -> str:
    """The first level whose names are known to be classes; empty = none is."""
    if classes:
        class_names = {normalize_name(name) for name in classes}
        for level, folders in enumerate(names, 1):
            if {normalize_name(name) for name in folders} <= class_names:
                return str(level)
    for level, folders in enumerate(names, 1):
        if all(SYNSET.fullmatch(name) for name in folders):
            return str(level)
    return ""


def _shared_folders(paths: Collection[Folders]) -> int:
    """Number of leading folders that all paths share."""
    shared = 0
    while len({folders[shared : shared + 1] for folders in paths}) == 1:
        if not next(iter(paths))[shared : shared + 1]:
            break
        shared += 1
    return shared


def _names_at(paths: Iterable[Folders], level: int) -> set[str]:
    return {folders[level - 1] for folders in paths if len(folders) >= level}


def _recur(paths: Collection[Folders]) -> bool:
    """Whether the second folders are the same below several first ones, or begin with them."""
    tops_of: dict[str, set[str]] = {}
    for folders in paths:
        tops_of.setdefault(folders[1], set()).add(folders[0])
    if len(tops_of) < 2:
        return False
    repeated = sum(len(tops) > 1 for tops in tops_of.values())
    initials = all(name.startswith(top) for name, tops in tops_of.items() for top in tops)
    return 2 * repeated >= len(tops_of) or initials


def _are_wrappers(facts: PathFacts) -> bool:
    """Whether each of several archives holds one folder, and that several others."""
    folders_of: dict[int, set[Folders]] = {}
    for number, folders in facts.folders:
        folders_of.setdefault(number, set()).add(folders[:2])
    return len(folders_of) > 1 and all(
        len({top for top, *_ in pairs}) == 1 and len(pairs) > 1 for pairs in folders_of.values()
    )


def _describe_choice(
    paths: Collection[Folders], source: str, levels: Sequence[int], shared: int
) -> str:
    """Say which levels may be the class, and which flag decides."""
    readings = []
    for level in levels:
        names = sorted(_names_at(paths, level))
        kind = "class" if len(names) == 1 else "classes"
        readings.append(f"--class-level {level} makes {len(names)} {kind} ({join_names(names, 3)})")
    root = "/".join(next(iter(paths))[:shared])
    under = f", as does --under {_quote_flag(root)} with shorter names" if shared else ""
    return (
        f"the class of the images of {source} may be one or another folder of their paths: "
        f"{', '.join(readings)}{under}; --class-level none takes them without classes."
    )


def _quote_flag(text: str) -> str:
    """An argument as it is typed in a shell."""
    plain = re.fullmatch(r"[\w./@%+=:-]+", text)
    return text if plain else "'" + quote_name(text).replace("'", "'\\''") + "'"
