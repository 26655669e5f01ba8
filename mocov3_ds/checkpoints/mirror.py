"""Copies of a run's checkpoints in a second place, and a fresh machine that goes on from them.

    MIRROR/config.json, metrics.jsonl, bad_samples.jsonl     as in the run folder
    MIRROR/checkpoints/step-00000500/...                     complete checkpoints
    MIRROR/mirror.json                                       which ones are complete: written last

MIRROR is a folder or a URL of an object store, where nothing can be renamed: a checkpoint counts
when `mirror.json` names it among `complete`. Folders that it names among `partial` may hold any
part of a checkpoint; they are emptied by and by.
"""

import json
import logging
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.run_folder import check_same_run
from mocov3_ds.data import storage
from mocov3_ds.data.storage.atomic import sync

_INDEX = "mirror.json"
_BESIDE = ("config.json", "metrics.jsonl", "bad_samples.jsonl")

_log = logging.getLogger("mocov3_ds")


class Mirror:
    """Sends complete checkpoints, the newest first, on a thread of its own.

    Trouble with the store is a warning, and the next checkpoint is the next try: training goes on.

    Args:
        url: a folder, or a URL of `data.storage`.
        run: run folder.
        keep: newest checkpoints that stay there.
        keep_every: those of multiples of so many steps stay as well; 0 = none.
    """

    def __init__(self, url: str, run: Path, *, keep: int, keep_every: int = 0) -> None:
        self._url, self._run, self._keep, self._keep_every = url, run, keep, keep_every
        self._thread: threading.Thread | None = None
        self._wanted: Path | None = None
        self._busy_with: Path | None = None
        self._change = threading.Lock()

    def send(self, folder: Path) -> None:
        """Copy a checkpoint as soon as the one before it is through; returns at once."""
        with self._change:
            if self._wanted is not None:
                _log.info("mirror %s is slow: %s is left out", self._url, self._wanted.name)
            self._wanted = folder
            if self._busy_with is None:
                self._busy_with = folder
                self._thread = threading.Thread(target=self._work, name="mirror")
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                folder, self._wanted = self._wanted, None
                self._busy_with = folder
            if folder is None:
                return
            try:
                copy_to(self._url, self._run, folder, keep=self._keep, keep_every=self._keep_every)
            except Exception as error:
                if not folder.exists():  # the run was rewound to before it
                    continue
                _log.warning(
                    "%s was not copied to the mirror: %s. It stays on this disk, and the next "
                    "checkpoint is the next try.",
                    folder.name,
                    error,
                )

    def reading(self) -> Collection[str]:
        """Names of the checkpoints that must not be pruned now."""
        with self._change:
            return [path.name for path in (self._busy_with, self._wanted) if path is not None]

    def close(self) -> None:
        """Wait until the last checkpoint is copied, or the store has been given up on."""
        if self._thread is not None:
            if self._thread.is_alive():
                _log.warning("waiting for the mirror %s", self._url)
            self._thread.join()
            self._thread = None


# ----------------------------------------------------------------------------------------- sending


def copy_to(url: str, run: Path, folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Copy a checkpoint, then make it count, then let old ones go.

    Raises:
        OSError: the store refused, or a file vanished; what counted before counts still.
        ValueError: the mirror's index is damaged.
    """
    complete, left = _index(url)
    _set_index(url, complete - {folder.name}, left | {folder.name})
    for path in sorted(folder.iterdir()):
        _copy(path, _join(url, "checkpoints", folder.name, path.name))
    for path in (run / name for name in _BESIDE):
        if path.exists():
            _copy(path, _join(url, path.name))
    complete |= {folder.name}
    stay = checkpoint.staying(
        [checkpoint.step_of(Path(name)) for name in complete],
        checkpoint.step_of(folder),
        keep,
        keep_every,
    )
    names = {f"step-{step:08d}" for step in stay}
    gone = (complete | left) - names
    _set_index(url, names, gone)
    for name in gone:
        there = _join(url, "checkpoints", name)
        for entry in storage.entries(there):
            storage.remove(storage.join(there, entry.name))
    if gone:
        _set_index(url, names, set())


def _copy(path: Path, url: str) -> None:
    with path.open("rb") as source, storage.open_write(url) as target:
        while block := source.read(storage.BLOCK):
            target.write(block)


def _set_index(url: str, complete: set[str], left: set[str]) -> None:
    index = {"complete": sorted(complete), "partial": sorted(left)}
    storage.write(_join(url, _INDEX), json.dumps(index, indent=1).encode())


def _index(url: str) -> tuple[set[str], set[str]]:
    """Complete and partial checkpoints of a mirror; none where there is no mirror yet."""
    try:
        content = storage.read(_join(url, _INDEX))
    except FileNotFoundError:
        return set(), set()
    try:
        index = json.loads(content)
        found = set(index["complete"]), set(index["partial"])
        for name in found[0] | found[1]:
            checkpoint.step_of(Path(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{_join(url, _INDEX)} is damaged; give another --save.mirror.") from None
    return found


def _join(url: str, *names: str) -> str:
    for name in names:
        url = storage.join(url, name)
    return url


# --------------------------------------------------------------------------------------- receiving


def check_same(url: str, resolved: Mapping[str, Any], data: str) -> None:
    """Refuse the mirror of another run; one that there is not yet is fine.

    Args:
        url: of the mirror.
        resolved: `Run.as_json()`.
        data: digest of the training shards' manifest.

    Raises:
        ValueError: the mirror is of another run, is damaged, or cannot be asked.
    """
    if _index(url)[0]:
        text = storage.read(_join(url, "config.json")).decode(errors="replace")
        check_same_run(text, url, resolved, data)


def fetch_newer(url: str, run: Path) -> Path | None:
    """Bring the newest whole checkpoint of a mirror here, if it is ahead of what is here.

    Args:
        url: of the mirror.
        run: run folder, locked.

    Returns:
        the checkpoint's folder; None where the run folder is as far as the mirror.

    Raises:
        ValueError: nothing in the mirror is whole and nothing is here, or it cannot be asked.
        OSError: this disk refused.
    """
    complete, _ = _index(url)
    here = checkpoint.newest(run)
    at, position = (-1, -1) if here is None else (here.step, here.position)
    steps = sorted((checkpoint.step_of(Path(name)) for name in complete), reverse=True)
    for step in (step for step in steps if step > at):
        try:
            folder = _fetch(url, run, step, position)
        except checkpoint.Refused:
            raise
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, storage.StorageError):
                raise
            _log.warning("passing over step %d of the mirror %s: %s", step, url, error)
        else:
            _log.warning("step %d comes from the mirror %s", step, url)
            return folder
    if at < 0 and steps:
        raise ValueError(
            f"none of the {len(steps)} checkpoints of the mirror {url} is whole (see above); give "
            "another --save.mirror to start anew."
        )
    return None


def _fetch(url: str, run: Path, step: int, position: int) -> Path:
    """Bring one here, if it is behind global batch `position`."""
    there = _join(url, "checkpoints", f"step-{step:08d}")
    aside = run / "checkpoints" / f"writing-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _receive(_join(there, "state.json"), aside / "state.json")
        state = checkpoint.read_state(aside)
        # a later step of fewer batches: the run was rewound to before it and has gone another way
        if state.get("position", step) <= position:
            raise ValueError(f"the run here is behind global batch {position} already")
        for name in state["files"]:
            _receive(storage.join(there, name), aside / name)
        Checkpoint(aside).verify()
        for name in _BESIDE:
            if name != "config.json" and storage.exists(_join(url, name)):
                _receive(_join(url, name), run / name)
        return checkpoint.install(aside, run, step)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _receive(url: str, path: Path) -> None:
    """A file from the mirror, on disk under its name when it is whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            for block in storage.chunks(url):
                file.write(block)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
