"""Stored bytes of samples by id: few ranged reads, each sample checked before it is handed out.

Shape suffixes: M = samples asked for.
"""

import threading
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import storage
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage.cache import Cache

GAP = 256 << 10
"""Bytes between two wanted samples that are read and thrown away rather than asked for apart."""

_ATTEMPTS = 5  # reads of a sample whose crc32 is wrong


class Unreadable:
    """A sample whose stored bytes are not those that the manifest describes."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def fetch(
    manifest: Manifest,
    ids_M: NDArray[np.int64],
    *,
    cache: Cache | None = None,
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Read samples, neighbours in a shard by one request.

    Args:
        manifest: of the set.
        ids_M: any order.
        cache: keeps what comes from a store on the local disk.
        stop: set it to give up waiting for a store that does not answer.

    Yields:
        Place in `ids_M` and the image's bytes, or why there are none; in stored order.

    Raises:
        FileNotFoundError: a shard is not there.
        OSError: the store cannot be read.
    """
    rows_M = manifest.index_N[ids_M]
    shard_M = np.searchsorted(manifest.first_S, ids_M, side="right") - 1
    begin_M = rows_M["offset"].astype(np.int64)
    end_M = begin_M + rows_M["size"]
    places = np.lexsort((begin_M, shard_M))
    shard, begin, end = shard_M[places], begin_M[places], end_M[places]
    apart = (shard[1:] != shard[:-1]) | (begin[1:] - end[:-1] > GAP)
    for run in np.split(np.arange(len(places)), np.flatnonzero(apart) + 1):
        if not len(run):
            continue
        number = int(shard[run[0]])
        url, digest = manifest.shard_url(number), manifest.shards[number].sha256
        of_run = places[run]
        wanted = zip(
            of_run.tolist(),
            begin[run].tolist(),
            end[run].tolist(),
            rows_M["crc32"][of_run].tolist(),
            strict=True,
        )
        at, last = int(begin[run[0]]), int(end[run].max())
        if cache is not None and not storage.is_local(url):
            opened = cache.open_read(url, at, digest, manifest.shards[number].bytes, stop=stop)
        else:
            opened = storage.open_read(url, at, last, stop=stop)
        with opened as file:
            for place, low, high, crc32 in wanted:
                if at != low:
                    file.seek(low)
                try:
                    data = file.read(high - low)
                except storage.Truncated:
                    data = b""
                at = low + len(data)
                if zlib.crc32(data) == crc32 and len(data) == high - low:
                    yield place, data
                else:
                    if cache is not None:
                        cache.forget(digest, low, high)
                    yield place, _again(url, low, high, crc32, stop)


def fetch_one(
    manifest: Manifest, sample_id: int, stop: threading.Event | None = None
) -> bytes | Unreadable:
    """Read one sample; see `fetch`."""
    ((_, data),) = fetch(manifest, np.array([sample_id]), stop=stop)
    return data


def key_of(manifest: Manifest, sample_id: int) -> tuple[str, str]:
    """Shard name and member name of a sample, for people who look for it."""
    shard = int(np.searchsorted(manifest.first_S, sample_id, side="right")) - 1
    offset = int(manifest.index_N["offset"][sample_id])
    try:  # the member's header ends where the image begins
        header = storage.read(manifest.shard_url(shard), offset - 512, offset)
    except OSError:
        header = b""
    name, prefix = (part.split(b"\0")[0] for part in (header[:100], header[345:500]))
    ustar = header[257:263] == b"ustar\0"
    path = b"/".join(part for part in ((prefix if ustar else b""), name) if part)
    return manifest.shards[shard].name, path.decode("utf-8", "replace")


def _again(
    url: str, begin: int, end: int, crc32: int, stop: threading.Event | None
) -> bytes | Unreadable:
    """Read a sample that came out wrong from the store, which may have it right."""
    reason = ""
    for _ in range(_ATTEMPTS - 1):
        try:
            data = storage.read(url, begin, end, stop=stop)
        except storage.Truncated:
            reason = "shard ends early"
            continue
        if zlib.crc32(data) == crc32:
            return data
        reason = "crc32 mismatch"
    return Unreadable(reason)
