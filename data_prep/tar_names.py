"""Which tars of one folder are meant? All, those of a pattern, or those that braces name.

s3://bucket/set                             all tars of a folder that can be listed
'tars/train-*.tar', --files 'train-*.tar'   those whose names match
'https://host/set/train-{000..127}.tar'     names in WebDataset's braces, as a web server
cannot list its files
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from data_prep.member_names import is_hidden, join_names, quote_name
from data_prep.source_files import check_split_names, expand_names, select_names
from mocov3_ds.data import storage

_QUESTIONS = 16
"""Requests at once when a store is asked whether files exist."""


def find_tars(url: str, files: str) -> tuple[str, list[str]]:
    """Return the folder of tars, and the patterns that their names must match; [] = all tars.

    Args:
        url: URL of the folder, of a tar, or of tars in one folder with braces, `*` or `::`.
        files: Patterns of the names in a folder, likewise; empty = all.

    Raises:
        ValueError: The tars lie in several folders, braces cannot be read, or both arguments name
            tars.
    """
    url = storage.take_login(url)
    patterns = expand_names(files) if files else []
    if storage.is_local(url) and storage.local_path(url).exists():
        path = storage.local_path(url)
        if not path.is_file() or not is_tar(path.name):
            return url, patterns
        _refuse_both(url, files)
        return str(path.parent), [path.name]
    if not _names_files(url):
        return url, patterns
    _refuse_both(url, files)
    parts = [storage.split_file_url(storage.take_login(name)) for name in expand_names(url)]
    folders = {folder for folder, _ in parts}
    if len(folders) > 1:
        listed = join_names([storage.hide_secrets(folder) for folder in folders], 3)
        raise ValueError(
            f"{quote_name(storage.hide_secrets(url))} names tars of {len(folders)} folders "
            f"({listed}); a manifest describes the tars of one, so give one folder at a time."
        )
    return folders.pop() or ".", [name for _, name in parts]


def is_tar(name: str) -> bool:
    """Whether a file is a plain tar by its name."""
    return name.lower().endswith(".tar")


def _refuse_both(url: str, files: str) -> None:
    if files:
        raise ValueError(
            f"{quote_name(storage.hide_secrets(url))} names tars itself, and --files "
            f"{quote_name(files)} does, too; give the folder of the tars with --files."
        )


def _names_files(url: str) -> bool:
    """Whether a URL, at which there may be nothing, names files and no folder."""
    if "::" in url:
        return True
    name = storage.split_file_url(url)[1]
    if is_tar(name) and not storage.is_local(url):
        return True
    if storage.is_web(url):  # ? and : are parts of every such address
        return any(mark in name for mark in "*{")
    return any(mark in url.rpartition("/")[2] for mark in "*?{:")


def list_tars(url: str, patterns: Sequence[str]) -> list[str]:
    """Names of the tars in a folder that match one of the patterns, without hidden ones.

    Args:
        url: URL of the folder.
        patterns: Patterns of their names; () = all.
    """
    names = [entry.name for entry in storage.list_files(url)]
    tars = [name for name in names if is_tar(name) and not is_hidden(name)]
    return select_names(tars, patterns)


def name_tars(url: str, patterns: Sequence[str]) -> list[str]:
    """Names of the tars that are meant, sorted; where a store cannot list, they are the patterns.

    Args:
        url: URL of the folder.
        patterns: Patterns of their names; () = all.

    Raises:
        ValueError: There are none, one that is named is missing, they are of several splits, or the
            server cannot list and they are not named.
    """
    if not storage.can_list(url):
        return _check_names(url, patterns)
    names = list_tars(url, patterns)
    if not names:
        matching = f" and matches {join_names([*patterns])}" if patterns else ""
        raise ValueError(f"{url} holds no file that ends in .tar{matching}.")
    missing = sorted({*patterns} - {*names})
    _refuse_missing(url, [name for name in missing if not _is_pattern(name)], len(patterns))
    if not patterns:
        check_split_names(names, url)
    return names


def check_present(url: str, names: Sequence[str]) -> None:
    """Check that tars exist which were named and not listed, before the first is read.

    Args:
        url: URL of the folder.
        names: Names of the tars.

    Raises:
        ValueError: One is missing.
        OSError: The store cannot be asked.
    """
    if storage.can_list(url):
        return
    urls = [storage.join_url(url, name) for name in names]
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        are_there = [*pool.map(storage.exists, urls)]
    missing = [name for name, is_there in zip(names, are_there, strict=True) if not is_there]
    _refuse_missing(url, missing, len(names))


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _refuse_missing(url: str, missing: Sequence[str], count: int) -> None:
    if missing:
        raise ValueError(
            f"{storage.hide_secrets(url)} holds no {quote_name(missing[0])}, one of {count} tars "
            f"that are asked for ({len(missing)} are missing)."
        )


def _check_names(url: str, patterns: Sequence[str]) -> list[str]:
    """The names of tars on a server that cannot list them."""
    folder = storage.hide_secrets(url)
    if not patterns or any(_is_pattern(name) for name in patterns):
        raise ValueError(
            f"{folder} is on a web server, which cannot list its files and is only read from: name "
            "the tars, as in --files 'train-{000..127}.tar', and a folder for their manifest with "
            "--manifest FOLDER."
        )
    for name in patterns:
        if not is_tar(name) or any(sign in name for sign in "/\\\0"):
            raise ValueError(f"{quote_name(name)}: no name of a tar in the folder {folder}.")
    return sorted({*patterns})
