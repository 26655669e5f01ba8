"""A run's folder: which run it belongs to (`config.json`) and which job works on it now (`lock`).

Reading needs neither: k-NN, probes and export look into a run while it trains.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mocov3_ds.config import Config
from mocov3_ds.data.storage.atomic import write_text
from mocov3_ds.version import __version__

_LOCK, _CONFIG = "lock", "config.json"
_OF_NO_RUN = {_LOCK, "config.json.tmp"}  # what a start that was killed leaves behind
PATIENCE_S = 30.0
"""Seconds that a new job waits for one that is just ending."""

_log = logging.getLogger("mocov3_ds")


def enter(run: Path, resolved: Mapping[str, Any], data: str) -> None:
    """Begin work on a run: refuse what is another's, lock the folder, write `config.json` if new.

    Args:
        run: run folder.
        resolved: `Run.as_json()`.
        data: digest of the training shards' manifest.

    Raises:
        ValueError: the folder belongs to a run with other settings or other data, or another job
            works on it. Nothing was changed then.
        OSError: the folder cannot be written.
    """
    _check_claim(run, resolved, data)
    lock(run)
    claim_folder(run, resolved, data)


# ------------------------------------------------------------------------------- one job at a time

_held: dict[Path, int] = {}  # run folder -> descriptor that holds its lock


def lock(run: Path, patience_s: float | None = None) -> None:
    """Make this process the only one that writes to a run, until `unlock` or its own end.

    The lock is the kernel's (`flock`), so it falls with its holder however that ends, kill -9
    included, and no stale one is ever left behind. A launcher that is killed alone leaves ranks in
    sessions of their own that go on training; their first rank goes on holding the lock.

    Args:
        run: run folder; made if there is none.
        patience_s: how long a holder that may be just ending is waited for; `PATIENCE_S` if None.

    Raises:
        ValueError: another job works on the run.
        OSError: the folder cannot be written.
    """
    if run.resolve() in _held:
        return
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for(descriptor, run, PATIENCE_S if patience_s is None else patience_s)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %Z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[run.resolve()] = descriptor


def unlock(run: Path) -> None:
    """Let other jobs work on a run; nothing happens where this process holds no lock."""
    descriptor = _held.pop(run.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def check_still_ours(run: Path) -> None:
    """Notice that a locked folder was removed or replaced while its job ran.

    Raises:
        ValueError: it was; writing on would mix two runs.
    """
    descriptor = _held.get(run.resolve())
    if descriptor is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat((run / _LOCK).stat(), os.fstat(descriptor)):
            return
    raise ValueError(
        f"{run} was removed or replaced while this job worked on it, so nothing more is written "
        "there; start the job again."
    )


def _forget_locks() -> None:
    """A forked child shares its parent's locks; they must not outlive the parent."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _wait_for(descriptor: int, run: Path, patience_s: float) -> None:
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            who, remedy = _holder(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _log.warning("%s: no locks here (%s); start no second job on it", run, error.strerror)
            return
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run} is in use by {who}. Wait for that job or end it ({remedy}; a killed "
                "launcher leaves such ranks behind), or give --name another name."
            )
        if not told:
            _log.warning("%s is in use by %s; waiting %.0f s for its end", run, who, patience_s)
            told = True
        time.sleep(0.1)


def _holder(descriptor: int) -> tuple[str, str]:
    """Who holds a lock, and how to end it."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        host, pid, since = found["host"], int(found["pid"]), found["since"]
    except (ValueError, KeyError, TypeError):  # it has only just taken it
        return "another job", "its process is the one that has the file `lock` open"
    there = "" if host == socket.gethostname() else f" on {host}"
    return f"process {pid} on {host} since {since}", f"kill {pid}{there}"


# ------------------------------------------------------------------------------- whose run it is

# What decides the numbers of a run. The rest (folders, threads, saving, watching, chunks, ZeRO
# stage) may differ between two sittings of the same run.
_DECIDES = (
    "batch",
    "epochs",
    "warmup_epochs",
    "lr_schedule",
    "decay",
    "seed",
    "views",
    "model",
    "moco",
    "alarm",
    "data.limit",
    "data.lanes",
    "data.pool",
)


def claim_folder(run: Path, resolved: Mapping[str, Any], data: str) -> None:
    """Write `config.json` of a new run, or check that an existing one is the same run.

    Args:
        run: run folder.
        resolved: `Run.as_json()`.
        data: digest of the training shards' manifest.

    Raises:
        ValueError: the folder belongs to a run with other settings or other data.
        OSError: the folder cannot be written.
    """
    if _check_claim(run, resolved, data):
        return
    run.mkdir(parents=True, exist_ok=True)
    whole = {**resolved, "data_digest": data, "version": __version__}
    write_text(run / _CONFIG, json.dumps(whole, indent=1))


def check_same_run(text: str, where: str, resolved: Mapping[str, Any], data: str) -> None:
    """Compare the text of a `config.json` with the settings of now.

    A knob that the version which wrote it did not have stands at its default.

    Args:
        text: content of the file.
        where: whose it is, for the message.
        resolved: `Run.as_json()`.
        data: digest of the training shards' manifest.

    Raises:
        ValueError: they describe another run, or the text is no such file.
    """
    try:
        theirs = json.loads(text)
    except json.JSONDecodeError:
        theirs = None
    if not isinstance(theirs, dict) or not isinstance(theirs.get("config"), dict):
        raise ValueError(f"config.json of {where} is damaged; move the folder away.")
    differing = list(_differences(theirs, {**resolved, "data_digest": data}))
    if differing:
        raise ValueError(
            f"{where} holds another run: {'; '.join(differing[:6])}. Give --name another name, "
            "or repeat the settings it was started with."
        )


def _check_claim(run: Path, resolved: Mapping[str, Any], data: str) -> bool:
    """Whether the folder already is this run's; False where it is free."""
    path = run / _CONFIG
    if path.exists():
        check_same_run(path.read_text(errors="replace"), str(run), resolved, data)
        return True
    if run.exists() and any(item.name not in _OF_NO_RUN for item in run.iterdir()):
        raise ValueError(
            f"{run} is not empty and holds no config.json, so it is no run of ours; give --name."
        )
    return False


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    pairs = [(f"config.{name}", name) for name in _DECIDES]
    pairs += [
        ("deepspeed.optimizer", "optimizer"),
        ("deepspeed.gradient_clipping", "gradient_clipping"),
        ("data_digest", "training shards"),
    ]
    defaults = {"config": json.loads(json.dumps(asdict(Config()), default=str))}
    for dotted, name in pairs:
        default = _at(defaults, dotted)
        there, here = (_filled(default, _at(side, dotted)) for side in (theirs, mine))
        yield from _leaf_differences(there, here, name)


def _filled(default: Any, value: Any) -> Any:
    if isinstance(default, Mapping):
        given = value if isinstance(value, Mapping) else {}
        return {**given, **{key: _filled(default[key], given.get(key)) for key in default}}
    return default if value is None else value


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _leaf_differences(theirs: Any, mine: Any, name: str) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for key in sorted({*theirs, *mine}):
            yield from _leaf_differences(theirs.get(key), mine.get(key), f"{name}.{key}")
    elif theirs != mine:
        yield f"{name} is {theirs} there, {mine} here"
