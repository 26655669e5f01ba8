"""Which shards are finished, and which images were left out?

Each shard has a receipt with its digest and its rows of the index, written after it. A shard counts
as finished when its receipt belongs to the present plan and its bytes have the receipt's digest.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import manifest, storage
from mocov3_ds.data.manifest import Shard

RECEIPTS = "receipts"
"""Folder of the receipts beside the shards."""
REJECTS = "rejects.jsonl"
"""File beside the shards that lists the images that were left out."""


@dataclass(frozen=True)
class Reject:
    """An image that was left out; the fields are keys of `rejects.jsonl`."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Receipt:
    """A finished shard."""

    shard: Shard
    rows: NDArray[np.void]
    """rows of dtype `manifest.ROW`, one for each sample of the shard"""
    rejects: tuple[Reject, ...]
    is_earlier: bool = False
    """whether an earlier run finished the shard"""


def write_rejects(rejects: Sequence[Reject], url: str) -> None:
    """List the images that were left out in a file of the set at `url`, if there are any."""
    if rejects:
        lines = "".join(json.dumps(vars(reject)) + "\n" for reject in rejects)
        storage.write(storage.join_url(url, REJECTS), lines.encode())


def receipt_url(url: str, shard_name: str) -> str:
    """URL of a shard's receipt in the set at `url`."""
    name = shard_name.removesuffix(".tar") + ".json"
    return storage.join_url(storage.join_url(url, RECEIPTS), name)


def write_receipt(receipt: Receipt, url: str, plan: str) -> None:
    """Write a receipt beside the shards.

    Args:
        receipt: Receipt of a shard whose bytes are in place.
        url: URL of the folder of the set.
        plan: Digest of the plan that the shard belongs to.
    """
    tree = {
        "plan": plan,
        "shard": vars(receipt.shard),
        "rejects": [vars(reject) for reject in receipt.rejects],
        "rows": base64.b64encode(receipt.rows.tobytes()).decode(),
    }
    storage.write(receipt_url(url, receipt.shard.name), json.dumps(tree).encode())


def find_finished(url: str, shard_name: str, plan: str) -> Receipt | None:
    """Return the receipt of a shard that an earlier run finished; None = make the shard.

    Args:
        url: URL of the folder of the set.
        shard_name: File name of the shard.
        plan: Digest of the plan that the shard must belong to.
    """
    receipt = _read_receipt(url, shard_name, plan)
    if receipt is not None and _is_intact(storage.join_url(url, shard_name), receipt.shard):
        return receipt
    return None


def _read_receipt(url: str, shard_name: str, plan: str) -> Receipt | None:
    """The receipt of a shard, if there is one of this plan that adds up."""
    try:
        tree = json.loads(storage.read(receipt_url(url, shard_name)))
        rows = np.frombuffer(base64.b64decode(tree["rows"]), dtype=manifest.ROW)
        shard = Shard(**tree["shard"])
        rejects = tuple(Reject(**reject) for reject in tree["rejects"])
        if tree["plan"] == plan and shard.name == shard_name and shard.samples == len(rows):
            return Receipt(shard, rows, rejects, is_earlier=True)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # damaged: the shard is made again
    return None


def _is_intact(url: str, shard: Shard) -> bool:
    """Whether the bytes of a shard are those of its receipt; a shard of rejects alone has none."""
    if not shard.samples:
        return True
    digest = hashlib.sha256()
    try:
        for block in storage.read_blocks(url):
            digest.update(block)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == shard.sha256
