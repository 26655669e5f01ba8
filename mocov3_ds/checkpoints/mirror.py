"""Copies of a run's checkpoints in a second place, from which a fresh machine can continue.

    MIRROR/config.json, metrics.jsonl, bad_samples.jsonl     as in the run folder
    MIRROR/checkpoints/step-00000500/...                     complete checkpoints
    MIRROR/mirror.json                                       names the complete ones; written last

MIRROR is a folder or the URL of an object store, where nothing can be renamed. Therefore a
checkpoint counts only if `mirror.json` names it among `complete`. A folder that is named among
`partial` may hold any part of a checkpoint; its files are removed with a later checkpoint.

A place that holds files of these names and no `mirror.json` is not ours and is refused. Only files
that a checkpoint has are ever removed, whatever `mirror.json` says.
"""

import json
import logging
import re
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint, CheckpointRefusedError, step_in_name
from mocov3_ds.checkpoints.checkpoint_writer import install_checkpoint, steps_to_keep
from mocov3_ds.checkpoints.run_folder import check_same_run
from mocov3_ds.data import storage
from mocov3_ds.data.storage.atomic import replace_when_whole

_INDEX = "mirror.json"
_BESIDE = ("config.json", "metrics.jsonl", "bad_samples.jsonl")
_INDEX_BYTES = 16 << 20  # more than any index of ours has
_CHECKPOINT = re.compile(r"step-\d{8,}")
_CHECKPOINT_FILE = re.compile(r"state\.json|\w+-\d+\.safetensors")

_log = logging.getLogger("mocov3_ds")


class Mirror:
    """Copies complete checkpoints on a thread of its own, the newest first.

    A failing store is only a warning, and the next checkpoint is the next attempt: the training
    goes on.

    Args:
        url: A folder, or a URL that `data.storage` can write to.
        run: The run folder.
        keep: Number of newest checkpoints that stay in the mirror.
        keep_every: Checkpoints of steps that are multiples of this number stay as well; 0 = none.
    """

    def __init__(self, url: str, run: Path, *, keep: int, keep_every: int = 0) -> None:
        self._url, self._run, self._keep, self._keep_every = url, run, keep, keep_every
        self._thread: threading.Thread | None = None
        self._next: Path | None = None
        self._current: Path | None = None
        self._lock = threading.Lock()

    def send(self, folder: Path) -> None:
        """Copy a checkpoint once the one before it is copied; returns at once.

        Args:
            folder: The complete checkpoint's folder.
        """
        with self._lock:
            if self._next is not None:
                _log.info("mirror %s is slow: %s is left out", self._url, self._next.name)
            self._next = folder
            if self._current is None:
                self._current = folder
                self._thread = threading.Thread(target=self._copy_all, name="mirror")
                self._thread.start()

    def _copy_all(self) -> None:
        while True:
            with self._lock:
                folder, self._next = self._next, None
                self._current = folder
            if folder is None:
                return
            try:
                copy_checkpoint(
                    self._url, self._run, folder, keep=self._keep, keep_every=self._keep_every
                )
            except Exception as error:  # the training goes on whatever the store does
                if not folder.exists():  # the run was rewound, which removed it
                    continue
                _log.warning(
                    "%s was not copied to the mirror: %s. It stays on this disk, and the next "
                    "checkpoint is the next try.",
                    folder.name,
                    error,
                )

    def names_in_use(self) -> Collection[str]:
        """Return the names of the checkpoint folders that must not be removed now."""
        with self._lock:
            return [path.name for path in (self._current, self._next) if path is not None]

    def close(self) -> None:
        """Wait until the last checkpoint is copied or its copying has failed."""
        if self._thread is not None:
            if self._thread.is_alive():
                _log.warning("waiting for the mirror %s", self._url)
            self._thread.join()
            self._thread = None


# ----------------------------------------------------------------------------------------- sending


def copy_checkpoint(url: str, run: Path, folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Copy a checkpoint to a mirror, name it in the index, then remove old ones.

    Args:
        url: URL of the mirror, or a folder.
        run: The run folder, whose metrics and settings are copied as well.
        folder: The complete checkpoint's folder.
        keep: Number of newest checkpoints that stay in the mirror.
        keep_every: Checkpoints of steps that are multiples of this number stay as well; 0 = none.

    Raises:
        OSError: The store failed, or a file vanished; the checkpoints that were complete before
            are complete still.
        ValueError: The mirror's index is damaged, or there are files in the way that are not ours.
    """
    complete, partial = _read_index(url)
    folder_url = _join(url, "checkpoints", folder.name)
    if folder.name not in complete | partial and storage.list_files(folder_url):
        raise ValueError(
            f"{folder_url} holds files and {_INDEX} does not name it, so they are not ours; give "
            "another --save.mirror"
        )
    _write_index(url, complete - {folder.name}, partial | {folder.name})
    for path in sorted(folder.iterdir()):
        _copy_file(path, storage.join_url(folder_url, path.name))
    for path in (run / name for name in _BESIDE):
        if path.exists():
            _copy_file(path, _join(url, path.name))
    complete |= {folder.name}
    steps = [step_in_name(Path(name)) for name in complete]
    staying = steps_to_keep(steps, step_in_name(folder), keep, keep_every)
    kept_names = {f"step-{step:08d}" for step in staying}
    removed_names = (complete | partial) - kept_names
    _write_index(url, kept_names, removed_names)
    for name in removed_names:
        removed_url = _join(url, "checkpoints", name)
        for entry in storage.list_files(removed_url):
            if _CHECKPOINT_FILE.fullmatch(entry.name):
                storage.remove_file(storage.join_url(removed_url, entry.name))
    if removed_names:
        _write_index(url, kept_names, set())


def _copy_file(path: Path, url: str) -> None:
    with path.open("rb") as source, storage.open_write(url) as target:
        while block := source.read(storage.BLOCK):
            target.write(block)


def _write_index(url: str, complete: set[str], partial: set[str]) -> None:
    index = {"complete": sorted(complete), "partial": sorted(partial)}
    storage.write(_join(url, _INDEX), json.dumps(index, indent=1).encode())


def _read_index(url: str) -> tuple[set[str], set[str]]:
    """Return the names of complete and of partial checkpoints; none in a mirror to be."""
    index_url = _join(url, _INDEX)
    damage = f"{index_url} is damaged; give another --save.mirror."
    try:
        if storage.file_size(index_url) > _INDEX_BYTES:
            raise ValueError(damage)
        content = storage.read(index_url)
    except FileNotFoundError:
        _check_nothing_is_there(url)
        return set(), set()
    try:
        index = json.loads(content)
        complete, partial = set(index["complete"]), set(index["partial"])
        is_sound = all(_CHECKPOINT.fullmatch(name) for name in complete | partial)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ValueError(damage)
    return complete, partial


def _check_nothing_is_there(url: str) -> None:
    """Refuse a place without an index that holds what the mirror would overwrite."""
    names = {entry.name for entry in storage.list_files(url)} & {*_BESIDE}
    if names:
        raise ValueError(
            f"{url} holds {min(names)} and no {_INDEX}, so it is no mirror of ours (a run folder?);"
            " give another --save.mirror."
        )


def _join(url: str, *names: str) -> str:
    for name in names:
        url = storage.join_url(url, name)
    return url


# --------------------------------------------------------------------------------------- receiving


def check_mirror(url: str, resolved: Mapping[str, Any], data_digest: str) -> None:
    """Refuse the mirror of another run; a mirror that does not exist yet is fine.

    Args:
        url: URL of the mirror, or a folder.
        resolved: The resolved settings, as `config.Settings.as_json` gives them.
        data_digest: Digest of the training shards' manifest.

    Raises:
        ValueError: The mirror belongs to another run, is damaged, or cannot be read.
    """
    complete, partial = _read_index(url)
    if complete | partial:
        try:
            text = storage.read(_join(url, "config.json")).decode(errors="replace")
        except FileNotFoundError:
            if not complete:  # the first copy did not get so far
                return
            raise ValueError(f"{url} has no config.json; give another --save.mirror.") from None
        check_same_run(text, url, resolved, data_digest)


def has_checkpoint(url: str) -> bool:
    """Tell whether a mirror names a complete checkpoint.

    Args:
        url: URL of the mirror, or a folder.

    Raises:
        ValueError: The mirror is damaged or cannot be read.
    """
    return bool(_read_index(url)[0])


def fetch_newer_checkpoint(url: str, run: Path) -> Path | None:
    """Copy the newest undamaged checkpoint of a mirror to the run folder, if it is newer.

    Args:
        url: URL of the mirror, or a folder.
        run: The run folder, locked by this process.

    Returns:
        The checkpoint's folder; None where the run folder is as far as the mirror.

    Raises:
        ValueError: The mirror has no undamaged checkpoint and the run folder has none either, or
            the mirror cannot be read.
        OSError: The local disk failed.
    """
    complete, _ = _read_index(url)
    local = checkpoint.find_newest(run)
    local_step, local_position = (-1, -1) if local is None else (local.step, local.position)
    steps = sorted((step_in_name(Path(name)) for name in complete), reverse=True)
    for step in (step for step in steps if step > local_step):
        try:
            folder = _fetch_checkpoint(url, run, step, local_position)
        except CheckpointRefusedError:
            raise
        except (ValueError, FileNotFoundError) as error:
            _log.warning("passing over step %d of the mirror %s: %s", step, url, error)
        else:
            _log.warning("step %d comes from the mirror %s", step, url)
            return folder
    if local is None and steps:
        raise ValueError(
            f"none of the {len(steps)} checkpoints of the mirror {url} is whole (see above); give "
            "another --save.mirror to start anew."
        )
    return None


def _fetch_checkpoint(url: str, run: Path, step: int, local_position: int) -> Path:
    """Copy one checkpoint to the run folder, if its run had used more global batches."""
    source = _join(url, "checkpoints", f"step-{step:08d}")
    temporary = run / "checkpoints" / f"writing-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _fetch_file(_join(source, "state.json"), temporary / "state.json")
        state = checkpoint.read_state(temporary)
        # a later step of fewer batches: the run was rewound before it, and has gone another way
        if state.get("position", step) <= local_position:
            raise ValueError(f"the run here is behind global batch {local_position} already")
        for name in state["files"]:
            if not _CHECKPOINT_FILE.fullmatch(name):
                raise ValueError(f"state.json names a file {name!r}, which no checkpoint has")
            _fetch_file(storage.join_url(source, name), temporary / name)
        Checkpoint(temporary).verify()
        for name in _BESIDE:
            if name != "config.json" and storage.exists(_join(url, name)):
                _fetch_file(_join(url, name), run / name)
        return install_checkpoint(temporary, run, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fetch_file(url: str, path: Path) -> None:
    with replace_when_whole(path) as temporary, temporary.open("wb") as file:
        for block in storage.read_blocks(url):
            file.write(block)
