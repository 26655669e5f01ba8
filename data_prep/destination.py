"""May this run write to a folder? One run at a time, and one plan for all its shards."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.receipts import RECEIPTS, REJECTS, Receipt
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.storage.atomic import remove_abandoned
from mocov3_ds.data.storage.locks import take_lock

PLAN = "plan.json"
"""File beside the shards that says what is being made."""


@contextlib.contextmanager
def lock_folder(url: str) -> Iterator[None]:
    """Keep a second run out of a local folder; in object storage it would only waste time.

    Raises:
        ValueError: Another run is writing to the folder, or it cannot be written.
    """
    storage.check_writable(url)
    if not storage.is_local(url):
        yield
        return
    folder = storage.local_path(url)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(descriptor, folder):
            raise ValueError(f"another run is writing to {url}; wait for it or stop it.")
        yield
    finally:
        os.close(descriptor)


def check_apart(url: str, root: str) -> None:
    """Refuse a destination that is no folder, or is the folder of the images itself.

    Args:
        url: URL of the folder of the set.
        root: Folder of the images; empty = they lie in archives.

    Raises:
        ValueError: It is. Tars among the images would change what the source is.
    """
    if not url:
        raise ValueError(
            "the destination is empty text; `.` names the folder in which this is run."
        )
    if root and storage.is_local(url) and storage.local_path(url).resolve() == Path(root).resolve():
        raise ValueError(
            f"{url} is the folder of the images themselves; give the shards one of their own."
        )


def claim_folder(url: str, plan: Mapping[str, Any]) -> None:
    """Write the plan into an empty folder, or find the same one in it.

    Args:
        url: URL of the folder of the set.
        plan: All that the shards depend on, as JSON values.

    Raises:
        ValueError: The folder holds shards of another plan, or other files.
    """
    plan_url, stored = storage.join_url(url, PLAN), b""
    try:
        stored = storage.read(plan_url)
        earlier = json.loads(stored)
    except FileNotFoundError:
        earlier = None
    except (ValueError, RecursionError):
        earlier = ()
    if not (earlier is None or isinstance(earlier, dict)):
        raise ValueError(
            f"{plan_url} is no plan of shards, it begins with {stored[:40]!r}: a store that "
            "answers so is no store, or the file is damaged; use a new folder, or empty this one."
        )
    if earlier == plan:
        return
    if earlier is not None:
        raise ValueError(
            f"{url} holds shards of another plan: {_plan_differences(earlier, plan)}; use a new "
            "folder, or remove that one."
        )
    names = [entry.name for entry in storage.list_files(url)]
    names += [entry.name for entry in storage.list_files(storage.join_url(url, RECEIPTS))]
    own_endings = (".tar", ".json", manifest.INDEX_NAME, REJECTS)  # what would be overwritten
    foreign = [name for name in names if name.endswith(own_endings)]
    if foreign:
        raise ValueError(
            f"{url} holds {foreign[0]!r}, which is not of this command (there is no {PLAN}); use "
            "an empty folder."
        )
    storage.write(plan_url, json.dumps(plan, indent=1).encode())


def _plan_differences(earlier: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    keys = sorted({*earlier} | {*plan}, key=lambda key: key == "listing")
    return ", ".join(
        "other images (names, sizes or classes)"
        if key == "listing"
        else f"{key} {earlier.get(key)!r} there, {plan.get(key)!r} asked for"
        for key in keys
        if earlier.get(key) != plan.get(key)
    )


def check_arrivals(receipts: Sequence[Receipt], url: str) -> None:
    """Check that the shards lie in a local folder: other machines may have one of their own.

    Raises:
        ValueError: A finished shard is not in the folder.
    """
    if not storage.is_local(url):
        return
    sizes = {entry.name: entry.size for entry in storage.list_files(url)}
    for receipt in receipts:
        shard = receipt.shard
        if shard.samples and sizes.get(shard.name) != shard.bytes:
            raise ValueError(
                f"{shard.name} was made and is not in {url}: on several machines the destination "
                "must be object storage or a file system that all of them share."
            )


def remove_leftovers(url: str) -> None:
    """Remove half-written files of killed runs from a local folder."""
    if storage.is_local(url):
        folder = storage.local_path(url)
        for parent in (folder, folder / RECEIPTS):
            remove_abandoned(parent, age_s=0.0)  # under this run's lock there is no other writer
