"""A run's folder: whose run it is (`config.json`), and which process works on it now (`lock`).

Reading needs neither: k-NN, probes and export look into a run while it trains.
"""

import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mocov3_ds.config.run_config import Config
from mocov3_ds.data.storage.address import hide_secrets
from mocov3_ds.data.storage.atomic import open_own, remove_abandoned, write_text
from mocov3_ds.data.storage.locks import take_lock
from mocov3_ds.settings.comparison import differences
from mocov3_ds.version import __version__

LOCK_WAIT_S = 30.0
"""Seconds to wait for a process that holds the lock and may be about to end."""

_LOCK, _CONFIG = "lock", "config.json"
_LEFTOVERS = re.compile(r"lock|config\.json(\.\d+-[0-9a-f]{8})?\.tmp")
"""Names of files that a start which was killed early leaves in a folder that is nobody's yet."""

_log = logging.getLogger("mocov3_ds")


def enter_folder(
    run: Path, resolved: Mapping[str, Any], data_digest: str, wait_s: float = LOCK_WAIT_S
) -> None:
    """Begin work on a run: check whose folder it is, lock it, write `config.json` if it is new.

    Args:
        run: Folder of the run, which need not exist.
        resolved: The resolved settings, as `config.Settings.as_json` gives them.
        data_digest: Digest of the training shards' manifest.
        wait_s: Seconds to wait for a process that works on the run and may be about to end.

    Raises:
        ValueError: The folder belongs to a run with other settings or other data, or another
            process works on it. Nothing was changed in this case.
        OSError: The folder cannot be written.
    """
    _is_claimed(run, resolved, data_digest)
    lock_folder(run, wait_s)
    claim_folder(run, resolved, data_digest)


# --------------------------------------------------------------------------- one process at a time

_descriptors: dict[Path, int] = {}
"""Run folder -> descriptor of the lock file, which holds the lock as long as it is open."""


def lock_folder(run: Path, wait_s: float = LOCK_WAIT_S) -> None:
    """Let only this process write to a run, until `unlock_folder` or until the process ends.

    The lock is the kernel's (`flock`): it ends with the process that holds it, even by a kill -9,
    so no stale lock is ever left behind. If only the launcher is killed, its ranks may go on
    training; their first rank goes on holding the lock.

    Args:
        run: The run folder; it is made if it does not exist.
        wait_s: Seconds to wait for a process that holds the lock and may be about to end.

    Raises:
        ValueError: Another process works on the run.
        OSError: The folder cannot be written.
    """
    if run.resolve() in _descriptors:
        return
    run.mkdir(parents=True, exist_ok=True)
    with open_own(run / _LOCK, os.O_RDWR) as file:
        descriptor = os.dup(file.fileno())
    try:
        _wait_for_lock(descriptor, run, wait_s)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %Z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        remove_abandoned(run)
    except BaseException:
        os.close(descriptor)
        raise
    _descriptors[run.resolve()] = descriptor


def unlock_folder(run: Path) -> None:
    """Let other processes work on a run; does nothing where this process holds no lock.

    Args:
        run: Folder of the run, which need not exist.
    """
    descriptor = _descriptors.pop(run.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def find_holder(run: Path, wait_s: float) -> str:
    """Return who works on a run, in words, once a time has passed; empty as soon as nobody does.

    Args:
        run: Folder of the run.
        wait_s: Seconds to wait for the end of a process that works on the run.
    """
    try:
        descriptor = os.open(run / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # nobody has ever worked on it
        return ""
    deadline = time.monotonic() + wait_s
    try:
        while not take_lock(descriptor, run, shared=True):  # others may look at the same time
            if time.monotonic() >= deadline:
                return _describe_holder(descriptor)[0]
            time.sleep(0.1)
        return ""
    finally:
        os.close(descriptor)


def check_lock_held(run: Path) -> None:
    """Check that a folder which this process has locked was not removed or replaced.

    Args:
        run: The run folder; one that this process has not locked is not checked.

    Raises:
        ValueError: It was, and writing to it would mix two runs.
    """
    descriptor = _descriptors.get(run.resolve())
    if descriptor is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat((run / _LOCK).stat(), os.fstat(descriptor)):
            return
    raise ValueError(
        f"{run} was removed or replaced while this process worked on it, so nothing more is "
        "written there; start the run again."
    )


def _close_locks() -> None:
    """Close the locks that a forked child shares, or they would outlive the parent."""
    for descriptor in _descriptors.values():
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_locks)


def _wait_for_lock(descriptor: int, run: Path, wait_s: float) -> None:
    deadline, warned = time.monotonic() + wait_s, False
    while not take_lock(descriptor, run):
        holder, remedy = _describe_holder(descriptor)
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run} is in use by {holder}. Wait for its end or end it ({remedy}; a killed "
                "launcher leaves such ranks behind), or give --name another name."
            )
        if not warned:
            _log.warning("%s is in use by %s; waiting %.0f s for its end", run, holder, wait_s)
            warned = True
        time.sleep(0.1)


def _describe_holder(descriptor: int) -> tuple[str, str]:
    """Return who holds a lock, and how to end that process."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        host, pid, since = content["host"], int(content["pid"]), content["since"]
    except (ValueError, KeyError, TypeError):  # the holder has not yet written its name
        return "another process", "it is the one that has the file `lock` open"
    on_host = "" if host == socket.gethostname() else f" on {host}"
    return f"process {pid} on {host} since {since}", f"kill {pid}{on_host}"


# ----------------------------------------------------------------------------- whose folder it is

# These settings decide the numbers of a run. All others (folders, threads, saving, monitoring,
# chunks, ZeRO stage) may differ between two attempts of the same run.
_DECIDING = (
    "init",
    "init_which",
    "extend",
    "extend_schedule",
    "batch",
    "epochs",
    "warmup_epochs",
    "lr_schedule",
    "compress",
    "rate_rule",
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


_ABOUT_EPOCHS = (
    " Other epochs are another schedule from the first step on: --extend goes on from a finished "
    "run under a new name."
)


def claim_folder(run: Path, resolved: Mapping[str, Any], data_digest: str) -> None:
    """Write `config.json` of a new run, or check that the folder belongs to the same run.

    Args:
        run: Folder of the run, which need not exist.
        resolved: The resolved settings, as `config.Settings.as_json` gives them.
        data_digest: Digest of the training shards' manifest.

    Raises:
        ValueError: The folder belongs to a run with other settings or other data.
        OSError: The folder cannot be written.
    """
    if _is_claimed(run, resolved, data_digest):
        return
    run.mkdir(parents=True, exist_ok=True)
    content = {**_without_secrets(resolved), "data_digest": data_digest, "version": __version__}
    write_text(run / _CONFIG, json.dumps(content, indent=1))


def _without_secrets(value: Any) -> Any:
    """Return settings in which no address has a user, a password or a signature."""
    if isinstance(value, str):
        return hide_secrets(value) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: _without_secrets(entry) for key, entry in value.items()}
    return [_without_secrets(entry) for entry in value] if isinstance(value, list) else value


def check_same_run(text: str, owner: str, resolved: Mapping[str, Any], data_digest: str) -> None:
    """Compare the text of a `config.json` with the present settings.

    A setting that the version which wrote the file did not have counts as set to its default.

    Args:
        text: Content of the file.
        owner: The folder or URL that the file is from, for the message.
        resolved: The resolved settings, as `config.Settings.as_json` gives them.
        data_digest: Digest of the training shards' manifest.

    Raises:
        ValueError: The file describes another run, or is damaged.
    """
    try:
        earlier = json.loads(text)
    except json.JSONDecodeError:
        earlier = None
    if not isinstance(earlier, dict) or not isinstance(earlier.get("config"), dict):
        raise ValueError(f"config.json of {owner} is damaged; move the folder away.")
    differing = list(_deciding_differences(earlier, {**resolved, "data_digest": data_digest}))
    if differing:
        longer = any(sentence.startswith("epochs is ") for sentence in differing)
        raise ValueError(
            f"{owner} holds another run: {'; '.join(differing[:6])}. Give --name another name, "
            f"or repeat the settings it was started with.{_ABOUT_EPOCHS * longer}"
        )


def _is_claimed(run: Path, resolved: Mapping[str, Any], data_digest: str) -> bool:
    """Tell whether the folder is already this run's; raise ValueError where it is another's."""
    path = run / _CONFIG
    if path.exists():
        check_same_run(path.read_text(errors="replace"), str(run), resolved, data_digest)
        return True
    if run.exists() and any(not _LEFTOVERS.fullmatch(item.name) for item in run.iterdir()):
        raise ValueError(
            f"{run} is not empty and holds no config.json, so it is no run of ours; give --name."
        )
    return False


def _deciding_differences(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    names = {f"config.{name}": name for name in _DECIDING} | {
        "deepspeed.optimizer": "optimizer",
        "deepspeed.gradient_clipping": "gradient_clipping",
        "data_digest": "training shards",
    }
    defaults = {"config": json.loads(json.dumps(asdict(Config()), default=str))}
    for path, name in names.items():
        default = _setting(defaults, path)
        yield from differences(
            _with_defaults(default, _setting(earlier, path)),
            _with_defaults(default, _setting(present, path)),
            name,
        )


def _with_defaults(default: Any, value: Any) -> Any:
    if isinstance(default, Mapping):
        values = value if isinstance(value, Mapping) else {}
        return {**values, **{key: _with_defaults(default[key], values.get(key)) for key in default}}
    return default if value is None else value


def _setting(tree: Any, path: str) -> Any:
    """Return the value at a path of keys with dots between them; None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
