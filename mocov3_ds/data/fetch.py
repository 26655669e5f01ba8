"""How do the stored bytes of samples get into memory? Stage 2 of the data path: read.

Samples are read by their number in the manifest, in few ranged reads, and the crc32 of each is
checked before it is handed out.

Shape suffixes: M = samples asked for, R = samples of one request.
"""

import threading
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import storage
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_source import SampleSource
from mocov3_ds.data.storage.cache import Cache

GAP = 256 << 10
"""Bytes between two samples that are read and thrown away, rather than asking for each sample."""

_ATTEMPTS = 5  # reads of a sample whose crc32 is wrong


class Unreadable:
    """A sample whose stored bytes are not those that the manifest describes.

    Args:
        reason: What is wrong with the bytes, in a few words.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_samples(
    manifest: Manifest,
    sample_ids_M: NDArray[np.int64],
    *,
    cache: Cache | None = None,
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Read samples, neighbours in a shard by one request.

    Args:
        manifest: Manifest of the set.
        sample_ids_M: Numbers of the samples in the manifest, in any order.
        cache: Cache that keeps on the local disk what comes from a store.
        stop: Event that ends the waiting for a store when it is set.

    Yields:
        Index into `sample_ids_M` and the image's bytes, or why there are none; in stored order.

    Raises:
        FileNotFoundError: A shard does not exist.
        OSError: The store cannot be read.
    """
    if manifest.source is not None:
        yield from _ask_source(manifest.source, sample_ids_M, stop)
        return
    for number, indices_R in _group_neighbours(manifest, sample_ids_M):
        rows_R = manifest.index_N[sample_ids_M[indices_R]]
        begin_R = rows_R["offset"].astype(np.int64)
        end_R = begin_R + rows_R["size"]
        position = int(begin_R[0])
        samples = zip(
            indices_R.tolist(),
            begin_R.tolist(),
            end_R.tolist(),
            rows_R["crc32"].tolist(),
            strict=True,
        )
        with (
            manifest.name_places(),
            _open_shard(manifest, number, position, int(end_R.max()), cache, stop) as file,
        ):
            for index, begin, end, crc32 in samples:
                if position != begin:
                    file.seek(begin)
                try:
                    image_bytes = file.read(end - begin)
                except storage.Truncated:
                    image_bytes = b""
                position = begin + len(image_bytes)
                if zlib.crc32(image_bytes) == crc32 and position == end:
                    yield index, image_bytes
                else:
                    if cache is not None:
                        cache.forget_range(manifest.shards[number].sha256, begin, end)
                    url = manifest.shard_url(number)
                    yield index, _reread_sample(url, begin, end, crc32, stop)


def _ask_source(
    source: SampleSource, sample_ids_M: NDArray[np.int64], stop: threading.Event | None
) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Index and bytes of each sample that lies in no shard; what its owner raises is the reason."""
    for index, sample_id in enumerate(sample_ids_M.tolist()):
        if stop is not None and stop.is_set():
            raise storage.Stopped(f"sample {sample_id}: stopped before it was asked for")
        try:
            image_bytes: bytes | Unreadable = source.read(sample_id)
        except Exception as error:
            image_bytes = Unreadable(f"{type(error).__name__}: {error}")
        yield index, image_bytes


def _group_neighbours(
    manifest: Manifest, sample_ids_M: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Shard number, and indices (R,) into `sample_ids_M` in stored order, of each request."""
    if not len(sample_ids_M):
        return
    rows_M = manifest.index_N[sample_ids_M]
    shard_M = np.searchsorted(manifest.first_S, sample_ids_M, side="right") - 1
    begin_M = rows_M["offset"].astype(np.int64)
    end_M = begin_M + rows_M["size"]
    stored_M = np.lexsort((begin_M, shard_M))  # indices in stored order
    shard_M, begin_M, end_M = shard_M[stored_M], begin_M[stored_M], end_M[stored_M]
    is_apart = (shard_M[1:] != shard_M[:-1]) | (begin_M[1:] - end_M[:-1] > GAP)
    first_R = np.concatenate([[0], np.flatnonzero(is_apart) + 1])
    yield from zip(shard_M[first_R].tolist(), np.split(stored_M, first_R[1:]), strict=True)


def read_sample(
    manifest: Manifest, sample_id: int, stop: threading.Event | None = None
) -> bytes | Unreadable:
    """Read one sample; see `read_samples`."""
    ((_, image_bytes),) = read_samples(manifest, np.array([sample_id]), stop=stop)
    return image_bytes


def locate_sample(manifest: Manifest, sample_id: int) -> tuple[str, str]:
    """Return the shard name and the member name of a sample, for people who look for it."""
    if manifest.source is not None:
        return manifest.shards[0].name, manifest.source.name(sample_id)
    shard = int(np.searchsorted(manifest.first_S, sample_id, side="right")) - 1
    offset = int(manifest.index_N["offset"][sample_id])
    try:  # the member's header ends where the image begins
        header = storage.read(manifest.shard_url(shard), offset - 512, offset)
    except OSError:
        header = b""
    name, prefix = (field.split(b"\0")[0] for field in (header[:100], header[345:500]))
    folder = prefix if header[257:263] == b"ustar\0" else b""
    member = b"/".join(filter(None, (folder, name)))
    return manifest.shards[shard].name, member.decode("utf-8", "replace")


def _open_shard(
    manifest: Manifest,
    number: int,
    start: int,
    end: int,
    cache: Cache | None,
    stop: threading.Event | None,
) -> BinaryIO:
    """Open a shard to read its bytes `start` to `end`, through the cache where there is one."""
    url, shard = manifest.shard_url(number), manifest.shards[number]
    if cache is not None and not storage.is_local(url):
        return cache.open_read(url, start, shard.sha256, shard.bytes, stop=stop)
    return storage.open_read(url, start, end, stop=stop)


def _reread_sample(
    url: str, start: int, end: int, crc32: int, stop: threading.Event | None
) -> bytes | Unreadable:
    """Read a sample that came out wrong once more from the store, which may have it right."""
    reason = ""
    for _ in range(_ATTEMPTS - 1):
        if stop is not None and stop.is_set():
            raise storage.Stopped(f"{storage.hide_secrets(url)}: stopped while it was read")
        try:
            image_bytes = storage.read(url, start, end, stop=stop)
        except storage.Truncated:
            reason = "shard ends early"
            continue
        if zlib.crc32(image_bytes) == crc32:
            return image_bytes
        reason = "crc32 mismatch"
    return Unreadable(reason)
