"""Object storage and shards, from each rank: are the bytes right, and how fast do they come."""

import hashlib
import os
import time
from collections.abc import Iterable

import numpy as np

from mocov3_ds.checks.finding import Finding, sound
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.distributed import ranks

_MB = 10**6
_OBJECT_BYTES = 24 * _MB  # two parts of an upload
_IMAGES, _VIEW = 200, 224

_REACH = (
    "check the URL, the credentials (AWS_*, GOOGLE_*, AZURE_* variables, ~/.aws, instance role) "
    "and AWS_ENDPOINT_URL on the machine of this rank."
)


def check_store(url: str, size: int = _OBJECT_BYTES) -> list[Finding]:
    """Write, list, read (whole and by range), compare and delete one object of this rank.

    Args:
        url: of a folder that may be written; empty = skip.
        size: bytes of the object.
    """
    name = "object store"
    if not url:
        return [Finding(name, "skip", "no --store URL")]
    token = ranks.broadcast_object(os.urandom(4).hex())
    key = f"doctor-{token}-{ranks.rank()}"
    where, data = storage.join(url, key), os.urandom(size)
    trouble, written, read = "", 0.0, 0.0
    try:
        began = time.perf_counter()
        storage.write(where, data)
        written = size / _MB / (time.perf_counter() - began)
        began = time.perf_counter()
        back = storage.read(where)
        read = size / _MB / (time.perf_counter() - began)
        trouble = _store_trouble(url, key, data, back)
        storage.remove(where)
        if not trouble and storage.exists(where):
            trouble = "an object is there after it was deleted"
    except (OSError, ValueError) as error:
        trouble = f"{error}"
    return [
        sound(
            name,
            f"{written:.0f} MB/s written, {read:.0f} MB/s read by a rank, equal bytes",
            "write, list, ranges, delete",
            trouble=trouble,
            remedy=_REACH,
            numbers={"written MB/s": written, "read MB/s": read},
        )
    ]


def _store_trouble(url: str, key: str, data: bytes, back: bytes) -> str:
    """What is wrong with an object that was just written; empty = nothing."""
    if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
        return f"{len(back)} bytes came back that differ from the {len(data)} written"
    sizes = {entry.name: entry.size for entry in storage.entries(url)}
    if sizes.get(key) != len(data):
        return f"the listing says {sizes.get(key)} bytes for {key}, {len(data)} were written"
    half = len(data) // 2
    for start, end in ((0, 1), (half, half + 1000), (len(data) - 10, len(data))):
        if storage.read(storage.join(url, key), start, end) != data[start:end]:
            return f"bytes {start} to {end} differ from what was written there"
    return ""


def check_shards(url: str) -> list[Finding]:
    """Manifest, one whole shard of this rank against its digest, and the speed of decoding.

    Args:
        url: of a sharded set; empty = skip.
    """
    if not url:
        return [Finding("shards", "skip", "no --shards URL")]
    try:
        made = manifest.load(url)
    except (OSError, ValueError) as error:
        return [Finding("shards", "fail", f"{error}", "a readable manifest", _REACH)]
    number = ranks.rank() % len(made.shards)
    try:
        began = time.perf_counter()
        content = b"".join(storage.chunks(made.shard_url(number)))
        speed = len(content) / _MB / max(time.perf_counter() - began, 1e-9)
    except (OSError, ValueError) as error:
        return [Finding("shards", "fail", f"{error}", "readable shards", _REACH)]
    shard = made.shards[number]
    sound = hashlib.sha256(content).hexdigest() == shard.sha256
    reading = Finding(
        "shards",
        "pass" if sound else "fail",
        f"{made.samples} samples in {len(made.shards)} shards; {shard.name}: {speed:.0f} MB/s"
        + ("" if sound else f", {len(content)} bytes that are not those of the manifest"),
        "sha256 of the manifest",
        ""
        if sound
        else f"write the set again, or find what is wrong: python -m data_prep verify {url}",
        {"MB/s": speed, "samples": made.samples},
    )
    return [reading, _decoding(made, number, content)] if sound else [reading]


def _decoding(made: Manifest, number: int, content: bytes) -> Finding:
    """Two crops of the first images of a shard, on one thread."""
    rows = made.index_N[made.first_S[number] : made.first_S[number + 1]][:_IMAGES]
    read, unreadable, seconds = _decode(
        content[int(row["offset"]) : int(row["offset"]) + int(row["size"])] for row in rows
    )
    rate = read / max(seconds, 1e-9)
    return sound(
        "decoding",
        f"{rate:.0f} images/s a thread, two crops of {_VIEW} pixels"
        + (f"; {unreadable} of {len(rows)} images are unreadable" if unreadable else ""),
        "all readable",
        trouble=unreadable,
        remedy="list them: python -m data_prep verify URL; a run replaces up to "
        "--data.max_bad_samples.",
        numbers={"images/s": rate, "unreadable": unreadable},
    )


def _decode(images: Iterable[bytes]) -> tuple[int, int, float]:
    """Images read, images unreadable, seconds."""
    out = np.empty((2, 3, _VIEW, _VIEW), np.uint8)
    read = unreadable = 0
    began = time.perf_counter()
    for data in images:
        try:
            height, width = decode.size_of(data)
            box = (0, 0, height, width)
            decode.two_crops(data, (box, box), (False, True), out)
            read += 1
        except UnreadableImage:
            unreadable += 1
    return read, unreadable, time.perf_counter() - began
