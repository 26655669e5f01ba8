"""Where on this machine do manifest and index of a set in a store lie? In a folder of our own.

    FOLDER/mocov3-index-1000/made-by-mocov3-ds    marks the folder (1000 = number of the user)
                             SHA256.manifest      a `manifest.json`, named by its digest
                             SHA256.index         an `index.bin`, named by its digest
                             SHA256.facts         what the check of both found, by the manifest's

FOLDER is that of `--data.cache`, or else the machine's for temporary files (`TMPDIR`). Files
appear whole by rename, so processes need no locks, and a run that goes on finds them again. What no
run has opened for 30 days is removed when something new is fetched.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mocov3_ds.data import storage
from mocov3_ds.data.shard_index import ROW, IndexFacts, join_rows, survey_rows
from mocov3_ds.data.shard_table import ShardTable
from mocov3_ds.data.storage.atomic import TEMPORARY_SUFFIX, replace_when_whole

MARK = "made-by-mocov3-ds"
"""File by which a folder is known as ours."""
UNUSED_S = 30 * 24 * 3600
"""Seconds after which files that no run has opened may be removed."""

Stamp = tuple[int, ...]


class NoPlace(ValueError):  # noqa: N818 - what is wrong, as `storage.Truncated`
    """An index of a store has no place on this machine, which the user can give it."""


@dataclass(frozen=True)
class CheckedFiles:
    """Where manifest and index of a set lie on this machine, and what their check found."""

    manifest_path: Path
    index_path: Path
    stamp: Stamp
    """of the index file when it was checked"""
    facts: IndexFacts

    def row_count(self) -> int:
        """Rows of the index file."""
        return self.stamp[2] // ROW.itemsize

    def is_unchanged(self) -> bool:
        """Whether the index file is still the one that was checked."""
        with contextlib.suppress(OSError):
            return file_stamp(self.index_path) == self.stamp
        return False


def file_stamp(path: Path) -> Stamp:
    """What tells whether a file was replaced or written to: place, size and times."""
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times)


def own_folder(parent: Path | None) -> Path:
    """Return the folder of this user for indexes, made and marked where it does not exist.

    Args:
        parent: Folder that holds it; None = the machine's folder for temporary files.

    Raises:
        NoPlace: It cannot be made, or something there is not ours.
    """
    folder = (parent or Path(tempfile.gettempdir())) / f"mocov3-index-{os.getuid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if is_ours and not os.path.lexists(folder / MARK):
            is_ours = not any(folder.iterdir())
            if is_ours:
                (folder / MARK).touch()
    except OSError as error:
        raise NoPlace(f"{_no_place(folder)} ({error.strerror}).") from None
    if not is_ours:
        raise NoPlace(f"{_no_place(folder)}, as it holds what this program did not make.")
    return folder


def index_bytes(shards: ShardTable) -> int:
    """Bytes of the index that shards need."""
    return int(shards.first_S[-1]) * ROW.itemsize


def _no_place(folder: Path) -> str:
    return (
        "the index of a set in a store needs a place on this machine; name a folder with "
        f"--data.cache or the variable TMPDIR: {str(folder)!r} cannot be used"
    )


def fetch_manifest(url: str, folder: Path) -> Path:
    """Copy a store's `manifest.json` to a folder of this machine, under its digest.

    Args:
        url: URL of the file.
        folder: Folder of this machine that `own_folder` gave.

    Raises:
        OSError: The store cannot be read, or the folder cannot be written.
    """
    digest = hashlib.sha256()
    incoming = folder / f"{os.getpid()}-{os.urandom(4).hex()}.manifest{TEMPORARY_SUFFIX}"
    try:
        with incoming.open("wb") as file:
            for block in storage.read_blocks(url):
                digest.update(block)
                file.write(block)
        path = folder / f"{digest.hexdigest()}.manifest"
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)
    return path


def check_index(
    url: str, shards: ShardTable, *, sha256: str, manifest_path: Path, parent: Path | None
) -> CheckedFiles:
    """Check an index; one in a store is fetched first, unless it is on this machine already.

    Args:
        url: URL of the index, as long as the shards have rows.
        shards: The shards that it describes.
        sha256: Its digest by the manifest, 64 hexadecimal digits.
        manifest_path: The manifest on this machine.
        parent: Folder for what is fetched, see `own_folder`.

    Raises:
        ValueError: It is not the one of the manifest, cannot be used, or there is no room for it.
        OSError: It cannot be read, or the folder cannot be written.
    """
    if storage.is_local(url):
        path = storage.local_path(url)
        stamp = file_stamp(path)
        return _accept(
            path, manifest_path, stamp, _survey(storage.read_blocks(url), shards), sha256
        )
    folder = own_folder(parent)
    path, facts_path = folder / f"{sha256}.index", manifest_path.with_suffix(".facts")
    checked = _read_facts(facts_path, manifest_path, path)
    if checked is None:
        facts = _survey_found(path, shards, sha256) or _fetch_index(url, path, shards, sha256)
        checked = _accept(path, manifest_path, file_stamp(path), facts, sha256)
        _write_facts(checked, facts_path)
    os.utime(facts_path)  # used now
    return checked


def _accept(
    path: Path, manifest_path: Path, stamp: Stamp, facts: IndexFacts, sha256: str
) -> CheckedFiles:
    if facts.sha256 != sha256:
        raise ValueError("index.bin is not the one that was written with it")
    if facts.problem:
        raise ValueError(facts.problem)
    return CheckedFiles(manifest_path, path, stamp, facts)


def _survey(blocks: Iterator[bytes], shards: ShardTable) -> IndexFacts:
    return survey_rows(join_rows(blocks), shards)


def _survey_found(path: Path, shards: ShardTable, sha256: str) -> IndexFacts | None:
    """Check a file that an earlier run has left; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == index_bytes(shards):
            facts = _survey(storage.read_blocks(str(path)), shards)
            return facts if facts.sha256 == sha256 else None
    return None


def _fetch_index(url: str, path: Path, shards: ShardTable, sha256: str) -> IndexFacts:
    """Copy an index to this machine, and check it on the way."""
    _remove_unused(path.parent)
    size = index_bytes(shards)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise NoPlace(
            f"{_no_place(path.parent)}, as the index has {size / 1e9:.2f} GB and {free / 1e9:.2f} "
            "GB are free"
        )
    with replace_when_whole(path) as temporary, temporary.open("wb") as file:

        def copied_blocks() -> Iterator[bytes]:
            for block in storage.read_blocks(url, 0, size):
                file.write(block)
                yield block

        facts = _survey(copied_blocks(), shards)
        if facts.sha256 != sha256:
            raise ValueError("index.bin is not the one that was written with it")
    return facts


def _read_facts(facts_path: Path, manifest_path: Path, path: Path) -> CheckedFiles | None:
    """What an earlier run found of the same manifest; None where the index is not the same now."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        tree = json.loads(facts_path.read_text())
        facts = IndexFacts(**tree["facts"])
        checked = CheckedFiles(manifest_path, path, tuple(tree["stamp"]), facts)
        return checked if checked.is_unchanged() else None
    return None


def _write_facts(checked: CheckedFiles, facts_path: Path) -> None:
    tree = {"stamp": checked.stamp, "facts": asdict(checked.facts)}
    with replace_when_whole(facts_path) as temporary:
        temporary.write_text(json.dumps(tree))


def _remove_unused(folder: Path) -> None:
    """Remove what no run has opened for long, and what killed runs have left half-written."""
    unused_since = time.time() - UNUSED_S
    used = {MARK}
    for item in folder.glob("*.facts"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if item.stat().st_mtime > unused_since:
                used |= {item.stem, json.loads(item.read_text())["facts"]["sha256"]}
    for item in folder.iterdir():
        with contextlib.suppress(OSError):
            if item.stem not in used and item.stat().st_mtime < unused_since:
                item.unlink()
