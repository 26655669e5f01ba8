"""Where does each sample lie? `index.bin`: checked in one pass, then mapped, never held.

The index of 10^8 samples has 3.2 GB. It is read once, in blocks, to check it and to sum up what is
asked of the whole; then it is mapped read-only, so that the processes of a machine share one copy
of the pages that they touch, and the kernel may drop them again. A local set's file is mapped where
it lies; a store's is fetched to a folder of this machine first (`index_folder`).

Shape suffixes: N = samples, S = shards, R = rows of a block.
"""

import hashlib
import itertools
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data.shard_table import ShardTable

SAMPLE_LIMIT = 256 << 20
"""Bytes of the largest stored image; its pixels would be refused as well."""

ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its shard; its header ends there
        ("size", "<u4"),  # bytes of the image
        ("crc32", "<u4"),  # zlib.crc32 of the image's bytes
        ("label", "<i4"),  # -1 = none
        ("width", "<u2"),  # pixels; 0 = not known
        ("height", "<u2"),
        ("reserved", "<u8"),  # zero
    ]
)

_BLOCK_ROWS = 1 << 16  # 2 MiB, which stay in a processor's cache


@dataclass(frozen=True)
class IndexFacts:
    """What one pass over an index and its shards found out."""

    image_bytes: int
    """of all samples"""
    unlabelled: int
    """samples without a label"""
    top_label: int
    """largest label; -1 = none has one"""
    sha256: str
    """of the file, hexadecimal"""
    digest: str
    """of the rows and the shards: identifies the samples and their order"""
    problem: str = ""
    """why the rows cannot be used; empty = they can"""


def survey_rows(blocks: Iterable[NDArray[np.void]], shards: ShardTable) -> IndexFacts:
    """Check an index against its shards and sum up what is asked of the whole.

    Args:
        blocks: The rows, some at a time, in their order; as many as the shards have samples.
        shards: The shards that the rows point into.
    """
    digest = hashlib.sha256()
    first, image_bytes, unlabelled, top_label, problem = 0, 0, 0, -1, ""
    for rows_R in blocks:
        digest.update(rows_R.tobytes())
        problem = problem or _find_problem(rows_R, first, shards)
        image_bytes += int(rows_R["size"].sum(dtype=np.int64))
        unlabelled += int((rows_R["label"] < 0).sum())
        top_label = max(top_label, int(rows_R["label"].max()))
        first += len(rows_R)
    sha256 = digest.hexdigest()
    for shard in shards:
        # a name may hold half a surrogate pair
        line = f"{shard.name} {shard.bytes} {shard.sha256}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    facts = (image_bytes, unlabelled, top_label, sha256, digest.hexdigest(), problem)
    return IndexFacts(*facts)


def _find_problem(rows_R: NDArray[np.void], first: int, shards: ShardTable) -> str:
    """Why rows from row `first` on cannot be used; empty = they can."""
    offset_R, size_R = rows_R["offset"], rows_R["size"]
    if (largest := int(size_R.max())) > SAMPLE_LIMIT:
        return f"it has a sample of {largest} bytes, {SAMPLE_LIMIT} at most are read"
    last = first + len(rows_R)
    begin, end = np.searchsorted(shards.first_S, [first, last - 1], side="right").tolist()
    bound_S = np.clip(shards.first_S[begin - 1 : end + 1], first, last)
    bytes_R = np.repeat(shards.bytes_S[begin - 1 : end].astype(np.uint64), np.diff(bound_S))
    # in this order nothing wraps around
    is_outside_R = (offset_R < 512) | (offset_R > bytes_R) | (size_R > bytes_R - offset_R)
    return "its index points outside the shards" if bool(is_outside_R.any()) else ""


def blocks_of_rows(index_N: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
    """Yield rows in blocks of 2 MiB."""
    for begin in range(0, len(index_N), _BLOCK_ROWS):
        yield index_N[begin : begin + _BLOCK_ROWS]


def join_rows(blocks: Iterable[bytes]) -> Iterator[NDArray[np.void]]:
    """Cut bytes that arrive in blocks of any length into whole rows; what is left over is dropped.

    Args:
        blocks: The bytes of an index in their order.
    """
    tail = b""
    for block in itertools.chain(blocks, [b""]):
        joined = tail + block if tail else block
        end = len(joined) - len(joined) % ROW.itemsize
        tail = joined[end:]
        if end:
            yield np.frombuffer(joined, dtype=ROW, count=end // ROW.itemsize)


def map_rows(path: Path, count: int) -> NDArray[np.void]:
    """Map the first rows (N,) of an index file read-only.

    Args:
        path: The file on this machine.
        count: Number of rows, 1 or more.

    Raises:
        ValueError: The file is shorter.
        OSError: The file cannot be mapped.
    """
    with path.open("rb") as file:
        # private: file systems in user space may refuse a shared one; pages are shared anyway
        mapped = mmap.mmap(
            file.fileno(), count * ROW.itemsize, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ
        )
    return np.frombuffer(mapped, dtype=ROW)
