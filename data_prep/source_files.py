"""Which files is a source made of? Folders, patterns, WebDataset's braces and `::`, and `--files`.

    path/to/train                     a folder of class folders, or of tars or parquet files
    'tars/train-*.tar'                a pattern, as a shell expands it
    'tars/train-{0000..0127}.tar'     WebDataset's braces; all the files must be there
    'a.tar::b.tar'                    several, joined as WebDataset joins them
    'pipe:COMMAND'                    what a command prints, where `--run-pipes` allows it

What exists under the very name that was given is meant by it, whatever characters the name has.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from data_prep import balance, command_sources, parquet, scratch
from data_prep.balance import Balance
from data_prep.listing import is_image_name
from data_prep.member_names import is_hidden, join_names, quote_name
from data_prep.splits import SPLIT_WORDS, find_split, sibling_splits
from mocov3_ds.data import manifest, storage

MOST_FILES = 1_000_000
"""Files that braces may name; a slip of the hand names more."""

_OURS = {manifest.NAME, manifest.INDEX_NAME, "plan.json", "rejects.jsonl", "receipts"}
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")


@dataclass
class SourceFiles:
    """The files of a source: a folder of images, or archives."""

    folder: Path
    """folder of the images, or of the archives"""
    archives: list[Path] = field(default_factory=list)
    """[] = a folder of images"""
    image_patterns: list[str] = field(default_factory=list)
    """patterns that the paths of images in the folder must match; [] = all images"""
    balance: Balance = field(default_factory=Balance)
    """files beside the archives"""


def find_source_files(source: str, files: str = "") -> SourceFiles:
    """Find the files of a source.

    Args:
        source: Path, pattern, braces, or several of these joined by `::`.
        files: Patterns that the names of the files must match, likewise; empty = all.

    Raises:
        ValueError: There is no such file, or files do not belong together.
    """
    patterns = expand_names(files) if files else []
    paths = [Path(name) for name in _expand_source(source)]
    if len(paths) == 1:
        return _find_in(paths[0], patterns, source)
    source_files = SourceFiles(Path(os.path.commonpath([path.parent.absolute() for path in paths])))
    for path in paths:
        files_of_path = _find_in(path, patterns, source)
        if not files_of_path.archives:
            raise ValueError(
                f"{quote_name(str(path))} is a folder of images, one of {len(paths)} paths that "
                f"{quote_name(source)} names; only archives are taken together."
            )
        source_files.archives += files_of_path.archives
        source_files.balance.add(files_of_path.balance)
    _check_kinds(source_files, source)
    if not patterns and "{" not in source and "::" not in source:
        check_split_names([path.name for path in source_files.archives], source)
    return source_files


def expand_names(text: str) -> list[str]:
    """Expand braces and `::` as webdataset does; without them the text is a name.

    Args:
        text: URL, path or pattern.

    Raises:
        ValueError: It is a `pipe:`, or the braces name too many files or are not closed.
    """
    if command_sources.names_command(text):
        shown_command = quote_name(command_sources.shorten_commands(text))
        raise ValueError(
            f"{shown_command} is a command (pipe:), whose output cannot be read in any order; name "
            "the files themselves, or let python -m data_prep shard run it: --run-pipes."
        )
    return _expand(text)


def run_commands(source: str, folder: Path | None) -> str:
    """Run the commands of a source; returns the source with a file in place of each.

    Args:
        source: What webdataset's lists hold: paths and `pipe:COMMAND`, braces, `::` between them.
        folder: Scratch folder for what the commands print; None = refuse.

    Raises:
        ValueError: There is no folder, or a command fails.
    """
    if not command_sources.names_command(source):
        return source
    if folder is None:
        shown_command = quote_name(command_sources.shorten_commands(source))
        raise ValueError(
            f"{shown_command} is a command, which only python -m data_prep shard runs."
        )
    names = _expand(source)
    for number, name in enumerate(names):
        if name.startswith(command_sources.PREFIX):
            names[number] = str(command_sources.run_command(name, number, folder))
    return "::".join(names)


def _expand(text: str) -> list[str]:
    """Names that braces and `::` stand for."""
    if "{" not in text and "::" not in text:
        return [text]
    count = 1
    for first, last in _RANGE.findall(text):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    if count > MOST_FILES:
        raise ValueError(f"the braces in {quote_name(text)} name more than {MOST_FILES} files.")
    # late: webdataset brings torch along
    from webdataset.shardlists import expand_urls

    try:
        return [str(url) for url in expand_urls(text)]
    except ValueError as error:
        raise ValueError(
            f"the braces in {quote_name(text)} cannot be read ({error}); they are written as in "
            "'train-{0000..0127}.tar'."
        ) from None


def is_archive(path: Path) -> bool:
    """Whether a file is a tar, a compressed tar or a parquet file by its name."""
    return path.suffix.lower() == ".tar" or is_table(path) or scratch.is_compressed_tar(path)


def is_table(path: Path) -> bool:
    """Whether a file is a parquet file by its name."""
    return path.suffix.lower() == ".parquet"


def select_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match one of the patterns; all of them where there are no patterns."""
    if not patterns:
        return [*names]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _expand_source(source: str) -> list[str]:
    """Paths that a source names, all of which exist."""
    if not source:
        raise ValueError("the source is empty text; `.` names the folder in which this is run.")
    if storage.is_local(source) and storage.local_path(source).exists():
        return [str(storage.local_path(source))]
    names = expand_names(source)
    for name in names:
        if not storage.is_local(name):
            raise ValueError(
                f"{quote_name(name)}: sources are files of this machine (or a mounted file "
                "system); destinations can be object storage."
            )
    paths: list[str] = []
    missing = []
    for name in names:
        path = str(storage.local_path(name))
        if Path(path).exists():
            paths.append(path)
        elif matches := sorted(glob.glob(path)):  # noqa: PTH207 - the root may be any
            paths += matches
        else:
            missing.append(name)
    if len(names) == 1 and missing:
        raise ValueError(
            f"there is no {quote_name(source)}; the source is a folder of class folders or a tar."
        )
    if missing:
        raise ValueError(
            f"there is no {quote_name(missing[0])}, one of {len(names)} files that "
            f"{quote_name(source)} names ({len(missing)} are missing)."
        )
    return paths


def _find_in(path: Path, patterns: Sequence[str], source: str) -> SourceFiles:
    """Files of one path."""
    if path.is_file():
        if not is_archive(path):
            raise ValueError(
                f"{quote_name(str(path))} is neither a tar ({', '.join(scratch.TAR_ENDINGS)}) nor "
                "a parquet file, nor a folder."
            )
        if not select_names([path.name], patterns):
            raise ValueError(f"{quote_name(str(path))} does not match --files.")
        return SourceFiles(path, [path])
    with os.scandir(path) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    source_files = SourceFiles(path)
    other_entries = []
    for entry in entries:
        if is_hidden(entry.name):
            source_files.balance.see()
            source_files.balance.leave_out(entry.name, balance.HIDDEN)
        elif is_archive(Path(entry.name)) and entry.is_file():
            source_files.archives.append(Path(entry.path))
        elif entry.name in _OURS:
            source_files.balance.see()
            source_files.balance.leave_out(entry.name, "part of a set's manifest")
        else:
            other_entries.append(entry)
    if not source_files.archives:
        return _find_below(path, patterns)
    _choose_archives(source_files, patterns, other_entries)
    _check_kinds(source_files, source)
    if not patterns:
        check_split_names([file.name for file in source_files.archives], source)
    return source_files


def _choose_archives(
    source_files: SourceFiles, patterns: Sequence[str], other_entries: Sequence["os.DirEntry[str]"]
) -> None:
    """Keep the archives that are asked for, and count the files beside them."""
    folder, archives = source_files.folder, source_files.archives
    images = [entry for entry in other_entries if is_image_name(entry.name) or entry.is_dir()]
    if images and not patterns:
        raise ValueError(
            f"{quote_name(str(folder))} holds archives ({quote_name(archives[0].name)}) beside "
            f"images or folders ({quote_name(images[0].name)}); shard each by itself, the archives "
            f"with --files '*{archives[0].suffix}'."
        )
    chosen = {*select_names([file.name for file in archives], patterns)}
    if not chosen:
        raise ValueError(
            f"none of the {len(archives)} archives in {quote_name(str(folder))} matches --files "
            f"{join_names([*patterns])}; there are {join_names([a.name for a in archives], 3)}."
        )
    source_files.archives = [file for file in archives if file.name in chosen]
    for file in archives:
        if file.name not in chosen:
            source_files.balance.see()
            source_files.balance.leave_out(file.name, balance.OUTSIDE)
    for entry in other_entries:
        source_files.balance.see()
        reason = balance.OUTSIDE if entry in images else balance.ending_reason(entry.name)
        source_files.balance.leave_out(entry.name, reason)


def _find_below(path: Path, patterns: Sequence[str]) -> SourceFiles:
    """Archives in folders below that `--files` names, or else a folder of images."""
    archives = [
        file
        for pattern in patterns
        if "/" in pattern and not pattern.startswith("/") and ".." not in pattern
        for file in path.glob(pattern)
        if is_archive(file) and file.is_file() and not is_hidden(str(file.relative_to(path)))
    ]
    if archives:
        return SourceFiles(path, sorted({*archives}))
    return SourceFiles(path, image_patterns=[*patterns])


def _check_kinds(source_files: SourceFiles, source: str) -> None:
    """Leave parquet files without images out from beside tars; refuse those with images."""
    tables = [file for file in source_files.archives if is_table(file)]
    if not tables or len(tables) == len(source_files.archives):
        return
    with_images = [file for file in tables if parquet.has_images(file)]
    if with_images:
        raise ValueError(
            f"{quote_name(source)} holds tars and parquet files with images "
            f"({quote_name(with_images[0].name)}); take one kind with --files '*.tar' or "
            "--files '*.parquet'."
        )
    for file in tables:
        source_files.balance.see()
        source_files.balance.leave_out(file.name, balance.NO_IMAGES)
    source_files.archives = [file for file in source_files.archives if not is_table(file)]


def check_split_names(names: Sequence[str], source: str) -> None:
    """Refuse archives whose names say that they are of several splits.

    Args:
        names: File names of the archives.
        source: Name of the source, for messages.

    Raises:
        ValueError: They are.
    """
    stems = {scratch.archive_stem(Path(name)): name for name in names}
    splits = sibling_splits(stems)
    if splits:
        examples = [stems[_first_of(splits, split)] for split in _kinds_of(splits)]
        patterns = [split_pattern(name) for name in examples]
        raise ValueError(
            f"{quote_name(source)} holds archives of several splits ({join_names(examples)}); "
            f"take one with --files {' or '.join(repr(pattern) for pattern in patterns)}, or all "
            "of them together with --files '*'."
        )


def _kinds_of(stems: Sequence[str]) -> list[str]:
    kinds = {find_split(stem)[0] for stem in stems}
    return [kind for kind in ("train", "val", "test") if kind in kinds]


def _first_of(stems: Sequence[str], kind: str) -> str:
    return next(stem for stem in stems if find_split(stem)[0] == kind)


def split_pattern(name: str) -> str:
    """Pattern of the archives of one split: the numbers behind its name may be any.

    `imagenet1k-train-0000.tar` gives `imagenet1k-train-*.tar`.
    """
    word = re.search("|".join(sorted(SPLIT_WORDS, key=len, reverse=True)), name.lower())
    split_end = word.end() if word else 0
    tail = re.sub(r"\d+(\D{1,4}\d+)*", "*", name[split_end:], count=1)
    return name[:split_end] + tail
