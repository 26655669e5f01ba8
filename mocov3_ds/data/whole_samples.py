"""How is a sample read with all its members, as webdataset's own reader gives it?

The index knows where each image lies. What else belongs to a sample (its label, JSON, text, masks)
stands beside the image in the tar, before or behind it, up to the neighbouring images:

    ... IMAGE i-1 | cls i-1 | json i | IMAGE i | cls i | header of i+1 | IMAGE i+1 ...
                  |--------------- slot of i -----------------|

So the slot is read, its tar headers are followed, and members are grouped by webdataset's rule: one
key up to the first dot of the file name, next to one another.

Shape suffixes: M = samples asked for, R = samples of one request.
"""

import contextlib
import io
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from mocov3_ds.data import storage
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.shard_index import SAMPLE_LIMIT

GAP = 256 << 10
"""Bytes between two slots that are read and thrown away, rather than asking for each slot."""
RUN_LIMIT = 64 << 20
"""Bytes of slots that are read at once, unless one alone has more."""
SLOT_LIMIT = 4 * SAMPLE_LIMIT
"""Bytes of the largest slot that is read."""

_ATTEMPTS = 5  # reads of a slot whose image is wrong
_BLOCK = tarfile.BLOCKSIZE
_META = re.compile("__[^/]*__($|/)")  # names that webdataset passes over


class _Slot(NamedTuple):
    """Where all members of a sample lie in their shard."""

    number: int
    """index into the samples asked for"""
    shard: int
    begin: int
    """behind the image before, or the shard's first byte"""
    end: int
    """first byte of the image behind, or the shard's end"""
    offset: int
    """first byte of the image"""
    size: int
    crc32: int


@dataclass
class _Group:
    """Neighbouring members of one key."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """bytes by suffix"""
    offsets: dict[int, str] = field(default_factory=dict)
    """suffix by the first byte in the shard, also of a member that does not lie here in full"""
    repeated: str = ""
    """a suffix that two members have"""


def read_whole_samples(
    manifest: Manifest, sample_ids_M: NDArray[np.int64], stop: threading.Event | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read samples with all their members, neighbours in a shard by one request.

    The crc32 of each image is checked; a sample that comes out wrong is read again. Other members
    have no crc32: a cut or shifted one is found by the headers around it.

    Args:
        manifest: Manifest of the set.
        sample_ids_M: Numbers of the samples in the manifest, in any order.
        stop: Event that ends the waiting for a store when it is set.

    Yields:
        Index into `sample_ids_M`, and the sample: `__key__`, `__url__`, and bytes by suffix.

    Raises:
        ValueError: A sample stays unreadable, or the index does not fit its shards.
        OSError: The store cannot be read.
    """
    for slots_R in _group_slots(_find_slots(manifest, sample_ids_M)):
        url = manifest.shard_url(slots_R[0].shard)
        with manifest.name_places():
            groups = _read_groups(url, slots_R[0].begin, slots_R[-1].end, stop)
        for slot in slots_R:
            sample_id = int(sample_ids_M[slot.number])
            group = groups.get(slot.offset)
            for _ in range(_ATTEMPTS - 1):
                if _is_right(group, slot):
                    break
                group = _read_groups(url, slot.begin, slot.end, stop).get(slot.offset)
            if group is not None and (group.repeated or slot.end in group.offsets):
                name = f"{group.key}.{group.repeated or group.offsets[slot.end]}"
                raise ValueError(
                    f"sample {sample_id} in {url!r} has a key with two images or two members of "
                    f"one suffix, {name!r}; webdataset has no such samples."
                )
            if group is None or not _is_right(group, slot):
                reason = "no tar header before it" if group is None else "crc32 mismatch"
                raise ValueError(
                    f"sample {sample_id} in {url!r} cannot be read ({reason} at byte "
                    f"{slot.offset}); python -m data_prep verify {manifest.url} lists the damage."
                )
            yield slot.number, {"__key__": group.key, "__url__": url, **group.members}


def _find_slots(manifest: Manifest, sample_ids_M: NDArray[np.int64]) -> list[_Slot]:
    """The slots of samples in stored order."""
    first_S, slots = manifest.first_S, []
    shard_M = np.searchsorted(first_S, sample_ids_M, side="right") - 1
    for number in np.argsort(sample_ids_M, kind="stable").tolist():
        sample_id, shard = int(sample_ids_M[number]), int(shard_M[number])
        begin, end = 0, int(manifest.table.bytes_S[shard])
        row = manifest.index_N[sample_id]
        if sample_id > first_S[shard]:
            neighbour = manifest.index_N[sample_id - 1]
            begin = -(-(int(neighbour["offset"]) + int(neighbour["size"])) // _BLOCK) * _BLOCK
        if sample_id + 1 < first_S[shard + 1]:
            end = int(manifest.index_N[sample_id + 1]["offset"])
        offset, size = int(row["offset"]), int(row["size"])
        if not begin < offset < end or end - begin > SLOT_LIMIT:
            raise ValueError(
                f"sample {sample_id} in {manifest.shard_url(shard)!r} lies at byte {offset}, its "
                f"neighbours say {begin} to {end}; index the shards anew with "
                f"{manifest.index_command}."
            )
        slots.append(_Slot(number, shard, begin, end, offset, size, int(row["crc32"])))
    return slots


def _group_slots(slots: list[_Slot]) -> Iterator[list[_Slot]]:
    """Cut slots in stored order into requests."""
    request: list[_Slot] = []
    for slot in slots:
        if request and (
            slot.shard != request[0].shard
            or slot.begin - request[-1].end > GAP
            or slot.end - request[0].begin > RUN_LIMIT
        ):
            yield request
            request = []
        request.append(slot)
    if request:
        yield request


def _is_right(group: _Group | None, slot: _Slot) -> bool:
    if group is None:
        return False
    image_bytes = group.members.get(group.offsets[slot.offset], b"")
    return len(image_bytes) == slot.size and zlib.crc32(image_bytes) == slot.crc32


def _read_groups(url: str, begin: int, end: int, stop: threading.Event | None) -> dict[int, _Group]:
    """Read a part of a tar from a member's border on; its groups by the offset of each member."""
    try:
        tar_bytes = storage.read(url, begin, end, stop=stop)
    except storage.Truncated:
        return {}
    groups: dict[int, _Group] = {}
    group = _Group("")
    for suffix, key, offset, content in _read_members(tar_bytes):
        if key != group.key:
            group = _Group(key)
        groups[begin + offset] = group
        if content is not None:
            if suffix in group.members:
                group.repeated = suffix
            group.members[suffix] = content
        group.offsets[begin + offset] = suffix
    return groups


def _read_members(tar_bytes: bytes) -> Iterator[tuple[str, str, int, bytes | None]]:
    """Yield suffix, key, place and bytes of each member; None for the bytes that are cut off."""
    # the last member's bytes lie behind the part, or a header is damaged
    with (
        contextlib.suppress(tarfile.ReadError),
        tarfile.open(fileobj=io.BytesIO(tar_bytes), mode="r:") as tar,
    ):
        while (member := tar.next()) is not None:
            key, suffix = base_plus_ext(member.name)
            if member.isreg() and key is not None and not _META.match(member.name):
                end = member.offset_data + member.size
                content = tar_bytes[member.offset_data : end] if end <= len(tar_bytes) else None
                yield suffix.lower(), key, member.offset_data, content
