"""Does each rank get the right bytes from object storage and shards, and how fast?"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable

import numpy as np

from mocov3_ds.checks.finding import Finding, judge_problem
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
    """Write, list, read (all of it and by range), compare and delete one object of this rank.

    Args:
        url: URL of a folder that may be written; empty = skip the check.
        size: size of the object in bytes.
    """
    name = "object store"
    if not url:
        return [Finding(name, "skip", "no --store URL")]
    token = ranks.broadcast_object(os.urandom(4).hex())
    key = f"doctor-{token}-{ranks.rank()}"
    object_url, data = storage.join_url(url, key), os.urandom(size)
    problem, write_speed, read_speed = "", 0.0, 0.0
    try:
        start = time.perf_counter()
        storage.write(object_url, data)
        write_speed = size / _MB / (time.perf_counter() - start)
        start = time.perf_counter()
        received = storage.read(object_url)
        read_speed = size / _MB / (time.perf_counter() - start)
        problem = find_damage(url, key, data, received)
        storage.remove_file(object_url)
        if not problem and storage.exists(object_url):
            problem = "an object is there after it was deleted"
    except (OSError, ValueError) as error:
        problem = f"{error}"
        with contextlib.suppress(OSError, ValueError):
            storage.remove_file(object_url)
    return [
        judge_problem(
            name,
            f"{write_speed:.0f} MB/s written, {read_speed:.0f} MB/s read by a rank, equal bytes",
            "write, list, ranges, delete",
            problem=problem,
            remedy=_REACH,
            numbers={"written MB/s": write_speed, "read MB/s": read_speed},
        )
    ]


def find_damage(url: str, key: str, data: bytes, received: bytes) -> str:
    """What is wrong with an object that was just written; empty = nothing.

    Args:
        url: URL of the folder that the object is in.
        key: name of the object in that folder.
        data: the bytes that were written.
        received: the bytes that a read of all of it returned.
    """
    if hashlib.sha256(received).digest() != hashlib.sha256(data).digest():
        return f"{len(received)} bytes came back that differ from the {len(data)} written"
    sizes = {entry.name: entry.size for entry in storage.list_files(url)}
    if sizes.get(key) != len(data):
        return f"the listing says {sizes.get(key)} bytes for {key}, {len(data)} were written"
    half = len(data) // 2
    for start, end in ((0, 1), (half, half + 1000), (len(data) - 10, len(data))):
        if storage.read(storage.join_url(url, key), start, end) != data[start:end]:
            return f"bytes {start} to {end} differ from what was written there"
    return ""


def check_shards(url: str) -> list[Finding]:
    """Read the manifest and one shard of this rank, compare its digest, and time the decoding.

    Args:
        url: folder or URL of a sharded set; empty = skip the check.
    """
    if not url:
        return [Finding("shards", "skip", "no --shards URL")]
    try:
        shards = manifest.load(url)
    except (OSError, ValueError) as error:
        return [Finding("shards", "fail", f"{error}", "a readable manifest", _REACH)]
    number = ranks.rank() % len(shards.shards)
    try:
        start = time.perf_counter()
        with shards.name_places():
            content = b"".join(storage.read_blocks(shards.shard_url(number)))
        speed = len(content) / _MB / max(time.perf_counter() - start, 1e-9)
    except (OSError, ValueError) as error:
        return [Finding("shards", "fail", f"{error}", "readable shards", _REACH)]
    shard = shards.shards[number]
    intact = hashlib.sha256(content).hexdigest() == shard.sha256
    reading = Finding(
        "shards",
        "pass" if intact else "fail",
        f"{shards.samples} samples in {len(shards.shards)} shards; {shard.name}: {speed:.0f} MB/s"
        + ("" if intact else f", {len(content)} bytes that are not those of the manifest"),
        "sha256 of the manifest",
        ""
        if intact
        else f"write the set again, or find what is wrong: python -m data_prep verify {url}",
        {"MB/s": speed, "samples": shards.samples},
    )
    return [reading, _check_decoding(shards, number, content)] if intact else [reading]


def _check_decoding(shards: Manifest, number: int, content: bytes) -> Finding:
    """Decode two crops of each of the first images of a shard, on one thread."""
    rows = shards.index_N[shards.first_S[number] : shards.first_S[number + 1]][:_IMAGES]
    read, unreadable, seconds = _time_decoding(
        content[int(row["offset"]) : int(row["offset"]) + int(row["size"])] for row in rows
    )
    rate = read / max(seconds, 1e-9)
    return judge_problem(
        "decoding",
        f"{rate:.0f} images/s a thread, two crops of {_VIEW} pixels"
        + (f"; {unreadable} of {len(rows)} images are unreadable" if unreadable else ""),
        "all readable",
        problem=unreadable,
        remedy="list them: python -m data_prep verify URL; a run replaces up to "
        "--data.max_bad_samples.",
        numbers={"images/s": rate, "unreadable": unreadable},
    )


def _time_decoding(images: Iterable[bytes]) -> tuple[int, int, float]:
    """Number of images read, number of unreadable ones, seconds."""
    crops_VCHW = np.empty((2, 3, _VIEW, _VIEW), np.uint8)
    read = unreadable = 0
    start = time.perf_counter()
    for image_bytes in images:
        try:
            height, width = decode.read_size(image_bytes)
            box = (0, 0, height, width)
            decode.cut_crops(image_bytes, (box, box), (False, True), crops_VCHW)
            read += 1
        except UnreadableImage:
            unreadable += 1
    return read, unreadable, time.perf_counter() - start
