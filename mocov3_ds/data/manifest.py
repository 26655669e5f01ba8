"""What is a sharded data set? `manifest.json` and `index.bin` beside plain WebDataset tars.

    train/manifest.json      format, how it was made, class names, and per shard: name, bytes,
                             samples, sha256; the size and sha256 of the index
    train/index.bin          one 32-byte row a sample, in shard order: where its image lies and its
                             crc32, label and size, so that any sample can be read by range, checked
                             before use, and labelled without opening its `.cls`
    train/train-000000.tar   KEY.jpg, KEY.cls, ... as any WebDataset reader opens them

`manifest.json` is written last: where it exists, the set is complete. A sample's id is its row.

Shape suffixes: N = samples, S = shards.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import storage

NAME, INDEX_NAME = "manifest.json", "index.bin"
FORMAT, VERSION = "mocov3-ds shards", 1

MANIFEST_LIMIT = 1 << 30
"""Bytes of the largest manifest that is read: some millions of shards."""
INDEX_LIMIT = 16 << 30
"""Bytes of the largest index that is read, as each rank holds all of it: 500 million samples."""
SAMPLE_LIMIT = 256 << 20
"""Bytes of the largest stored image; its pixels would be refused as well."""
_SHA256 = re.compile("[0-9a-f]{64}")

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


@dataclass(frozen=True)
class Shard:
    """One tar of a set; the fields are the keys of `manifest.json`."""

    name: str
    """file name beside the manifest"""
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """A sharded data set: its shards, and where each sample lies in them."""

    url: str
    """folder of the manifest and the shards"""
    shards: tuple[Shard, ...]
    index_N: NDArray[np.void] = field(repr=False)
    """rows of dtype `ROW`, shard after shard"""
    classes: tuple[str, ...] = ()
    """names by label; empty = not known"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """how the set was made: program version, options, seed, source"""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return len(self.index_N)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def has_labels(self) -> bool:
        """Whether every sample has a label."""
        return bool((self.index_N["label"] >= 0).all())

    @cached_property
    def first_S(self) -> NDArray[np.int64]:  # noqa: N802 - a shape suffix
        """Id of the first sample of each shard, and N behind the last, (shards + 1,)."""
        counts = [shard.samples for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the samples and their order, whatever the folder is called."""
        digest = hashlib.sha256(self.index_N.tobytes())
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.bytes} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def first_samples(self, count: int) -> "Manifest":
        """Return the set cut down to its first `count` samples.

        Raises:
            ValueError: The set has fewer.
        """
        if not 0 < count <= self.samples:
            raise ValueError(f"{self.url} holds {self.samples} samples; {count} cannot be taken.")
        room_S = np.clip(count - self.first_S[:-1], 0, None)
        shards = tuple(
            replace(shard, samples=min(shard.samples, int(room)))
            for shard, room in zip(self.shards, room_S, strict=True)
            if room
        )
        return replace(self, shards=shards, index_N=self.index_N[:count])

    def shard_url(self, shard: int) -> str:
        """Return the URL of a shard by its number."""
        return storage.join_url(self.url, self.shards[shard].name)


def write(
    url: str,
    shards: Sequence[Shard],
    index_N: NDArray[np.void],
    *,
    classes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Put `index.bin` and then, as the mark of completeness, `manifest.json` into a folder.

    Args:
        url: Folder of the shards, which must exist already.
        shards: The shards in the order of their names.
        index_N: Rows of dtype `ROW`, shard after shard.
        classes: Names of the classes by label.
        provenance: How the set was made, as JSON values.
    """
    manifest = Manifest(url, tuple(shards), index_N, tuple(classes), dict(provenance or {}))
    rows = index_N.tobytes()
    storage.write(storage.join_url(url, INDEX_NAME), rows)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "classes": list(classes),
        "made": manifest.provenance,
        "index": {
            "name": INDEX_NAME,
            "bytes": len(rows),
            "sha256": hashlib.sha256(rows).hexdigest(),
        },
        "shards": [vars(shard) for shard in shards],
    }
    storage.write(storage.join_url(url, NAME), json.dumps(tree, indent=1).encode())
    return manifest


def load(
    url: str, *, manifest_limit: int = MANIFEST_LIMIT, index_limit: int = INDEX_LIMIT
) -> Manifest:
    """Read and check a manifest; nothing in it is trusted.

    Args:
        url: Folder that holds `manifest.json`, or that file.
        manifest_limit: Bytes of the largest `manifest.json` that is read.
        index_limit: Bytes of the largest `index.bin` that is read.

    Raises:
        ValueError: There is no manifest, or it is not one of this program, of a later version, or
            at odds with itself.
    """
    url = url.removesuffix("/" + NAME).rstrip("/") or "/"
    try:
        text = _read_at_most(storage.join_url(url, NAME), manifest_limit)
    except FileNotFoundError:
        raise ValueError(
            f"{url} holds no {NAME}; make shards with python -m data_prep shard SOURCE {url}, or "
            f"describe tars that are there with python -m data_prep index {url}."
        ) from None
    try:
        return _parse(text, url, index_limit)
    except FileNotFoundError as error:
        raise ValueError(f"{url}/{NAME} names files that are not there: {error}.") from None
    except storage.StorageError:
        raise
    except KeyError as error:
        raise ValueError(f"{url}/{NAME} cannot be used: it has no entry {error}.") from None
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{url}/{NAME} cannot be used: {str(error).rstrip('.')}.") from None


def _read_at_most(url: str, limit: int) -> bytes:
    """Read a whole file, unless it is larger than it can honestly be."""
    size = storage.file_size(url)
    if size > limit:
        raise ValueError(f"{url} has {size} bytes, {limit} at most are read.")
    return storage.read(url)


def _parse(text: bytes, url: str, index_limit: int) -> Manifest:
    """Build the manifest that a `manifest.json` describes, with the rows of its `index.bin`."""
    tree = json.loads(text)
    if tree["format"] != FORMAT:
        raise ValueError(f"format is {tree['format']!r}")
    if tree["version"] > VERSION:
        raise ValueError(
            f"version {tree['version']} is later than this program's {VERSION}; update it"
        )
    shards = tuple(_parse_shard(entry) for entry in tree["shards"])
    count = sum(shard.samples for shard in shards)
    if int(tree["index"]["bytes"]) != count * ROW.itemsize:
        raise ValueError(
            f"{INDEX_NAME} is said to have {tree['index']['bytes']} bytes where {count} "
            f"samples need {count * ROW.itemsize}"
        )
    rows = _read_at_most(storage.join_url(url, INDEX_NAME), index_limit)
    if hashlib.sha256(rows).hexdigest() != tree["index"]["sha256"]:
        raise ValueError(f"{INDEX_NAME} is not the one that was written with it")
    index_N = np.frombuffer(rows, dtype=ROW)
    classes = tuple(str(name) for name in tree["classes"])
    manifest = Manifest(url, shards, index_N, classes, dict(tree["made"]))
    _check_manifest(manifest)
    return manifest


def _parse_shard(entry: Mapping[str, Any]) -> Shard:
    shard = Shard(
        str(entry["name"]), int(entry["bytes"]), int(entry["samples"]), str(entry["sha256"])
    )
    if (
        shard.name in ("", ".", "..")
        or any(c in shard.name for c in "/\\\0")
        or not storage.is_local(shard.name)
    ):
        raise ValueError(f"shard name {shard.name!r} is not a plain file name")
    # the smallest sample is a header and a block; the largest shard any store holds is 50 TiB
    if not 0 <= shard.samples <= shard.bytes // 1024 or shard.bytes > 50 << 40:
        raise ValueError(f"shard {shard.name} has {shard.bytes} bytes and {shard.samples} samples")
    if not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"shard {shard.name} has no sha256 but {shard.sha256!r}")
    return shard


def _check_manifest(manifest: Manifest) -> None:
    if int(manifest.first_S[-1]) != manifest.samples:
        raise ValueError(
            f"its shards count {int(manifest.first_S[-1])} samples, its index {manifest.samples}"
        )
    if not manifest.samples:
        raise ValueError("it holds no samples")
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise ValueError("it names a shard twice")
    bytes_N = np.repeat(  # of each sample's shard
        np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64),
        [shard.samples for shard in manifest.shards],
    )
    offset_N, size_N = manifest.index_N["offset"], manifest.index_N["size"]
    if int(size_N.max()) > SAMPLE_LIMIT:
        raise ValueError(
            f"it has a sample of {size_N.max()} bytes, {SAMPLE_LIMIT} at most are read"
        )
    # in this order nothing wraps around
    if bool(((offset_N < 512) | (offset_N > bytes_N) | (size_N > bytes_N - offset_N)).any()):
        raise ValueError("its index points outside the shards")
