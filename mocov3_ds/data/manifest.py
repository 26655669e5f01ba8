"""What is a sharded data set? `manifest.json` and `index.bin` beside plain WebDataset tars.

    train/manifest.json      format, how it was made, class names, and per shard: name, bytes,
                             samples, sha256; the size and sha256 of the index
    train/index.bin          one 32-byte row a sample, in shard order: where its image lies and its
                             crc32, label and size, so that any sample can be read by range, checked
                             before use, and labelled without opening its `.cls`
    train/train-000000.tar   KEY.jpg, KEY.cls, ... as any WebDataset reader opens them

`manifest.json` is written last: where it exists, the set is complete. A sample's id is its row.
Tars that lie where nothing can be written have their manifest elsewhere, which says where they lie
(`shards_at`, see `shard_place`).
Neither file is ever held in memory as a whole: the index is mapped (`shard_index`), and of the
manifest columns are kept (`shard_table`), so that a set may have 10^10 samples.

Shape suffixes: N = samples, S = shards.
"""

import contextlib
import hashlib
import json
import re
import shlex
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import index_folder, shard_index, storage
from mocov3_ds.data.index_folder import CheckedFiles
from mocov3_ds.data.json_stream import JsonStream
from mocov3_ds.data.sample_source import SampleSource, check_address
from mocov3_ds.data.shard_index import ROW, SAMPLE_LIMIT
from mocov3_ds.data.shard_place import parse_place
from mocov3_ds.data.shard_table import Shard, ShardTable

__all__ = ["INDEX_NAME", "NAME", "ROW", "SAMPLE_LIMIT", "Manifest", "Shard", "load", "write"]

NAME, INDEX_NAME = "manifest.json", "index.bin"
FORMAT, VERSION = "mocov3-ds shards", 1

MANIFEST_LIMIT = 1 << 30
"""Bytes of the largest manifest that is read: some millions of shards."""
INDEX_LIMIT = 1 << 40
"""Bytes of the largest index that is mapped: 3.4 x 10^10 samples."""
CLASS_LIMIT = 1 << 24
"""Classes of a set, at most."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Manifest:
    """A sharded data set: its shards, and where each sample lies in them."""

    url: str
    """folder of the manifest, and of the shards where `shards_at` is empty"""
    shards: Sequence[Shard]
    index_N: NDArray[np.void] = field(repr=False)
    """rows of dtype `ROW`, shard after shard; mapped from a file where the set was loaded"""
    classes: tuple[str, ...] = ()
    """names by label; empty = not known"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """how the set was made: program version, options, seed, source"""
    files: CheckedFiles | None = field(default=None, repr=False)
    """where the set lies on this machine, with what its check found; None = it is only in memory"""
    shards_at: str = ""
    """folder of the shards, an absolute path or URL; empty = beside the manifest"""
    source: SampleSource | None = field(default=None, repr=False)
    """who gives the samples where no shard does"""

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardTable):
            object.__setattr__(self, "shards", ShardTable(self.shards))

    def __getstate__(self) -> dict[str, Any]:
        """What another process of this machine gets: of a mapped index its file, not its rows."""
        state = dict(vars(self))
        if self.files is not None:
            state["index_N"] = self.samples
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files: CheckedFiles | None = state["files"]
        if files is not None:
            rows_N = shard_index.map_rows(files.index_path, state["index_N"])
            state = {**state, "index_N": rows_N}
        vars(self).update(state)

    @property
    def table(self) -> ShardTable:
        """The shards as columns."""
        assert isinstance(self.shards, ShardTable)
        return self.shards

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return len(self.index_N)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.table.bytes_S.sum())

    @cached_property
    def _facts(self) -> shard_index.IndexFacts:
        """What is asked of the whole set."""
        if self.files is not None and self.files.row_count() == self.samples:
            return self.files.facts
        return shard_index.survey_rows(shard_index.blocks_of_rows(self.index_N), self.table)

    @property
    def has_labels(self) -> bool:
        """Whether every sample has a label."""
        return self._facts.unlabelled == 0

    @property
    def top_label(self) -> int:
        """Largest label of a sample; -1 = none has one."""
        return self._facts.top_label

    @property
    def mean_bytes(self) -> float:
        """Mean bytes of an image."""
        return self._facts.image_bytes / max(self.samples, 1)

    @property
    def first_S(self) -> NDArray[np.int64]:  # noqa: N802 - a shape suffix
        """Id of the first sample of each shard, and N behind the last, (shards + 1,)."""
        return self.table.first_S

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the samples and their order, whatever the folder is called."""
        return self._facts.digest

    def first_samples(self, count: int) -> "Manifest":
        """Return the set cut down to its first `count` samples.

        Raises:
            ValueError: The set has fewer.
        """
        if not 0 < count <= self.samples:
            raise ValueError(f"{self.url} holds {self.samples} samples; {count} cannot be taken.")
        if count == self.samples:
            return self
        room_S = np.clip(count - self.first_S[:-1], 0, None)
        kept_S = np.minimum(self.table.samples_S, room_S)
        shards = ShardTable(
            replace(self.shards[number], samples=int(kept_S[number]))
            for number in np.flatnonzero(room_S).tolist()
        )
        return replace(self, shards=shards, index_N=self.index_N[:count])

    @property
    def shards_url(self) -> str:
        """Folder of the shards."""
        return self.shards_at or self.url

    def shard_url(self, shard: int) -> str:
        """Return the URL of a shard by its number."""
        return storage.join_url(self.shards_url, self.shards[shard].name)

    @property
    def index_command(self) -> str:
        """Command that describes the shards anew."""
        folders = [storage.hide_secrets(self.shards_url)]
        folders += ["--manifest", storage.hide_secrets(self.url)] if self.shards_at else []
        return f"python -m data_prep index --replace {shlex.join(folders)}"

    @contextlib.contextmanager
    def name_places(self) -> Iterator[None]:
        """Say of a shard that is gone which manifest says that it lies there.

        Raises:
            FileNotFoundError: One was raised inside.
        """
        try:
            yield
        except FileNotFoundError as error:
            if not self.shards_at:
                raise
            shard = storage.hide_secrets(str(error.filename or error).rstrip("."))
            folder = storage.hide_secrets(self.shards_at)
            raise FileNotFoundError(
                f"a shard is gone ({shard}): {NAME} in {self.url!r} says that the tars lie in "
                f"{folder!r}; bring them back, or describe them where they lie now: python -m "
                f"data_prep index TARS --replace --manifest {shlex.quote(self.url)}."
            ) from None


own_sets: weakref.WeakValueDictionary[str, Manifest] = weakref.WeakValueDictionary()
"""sets in the memory of this process by address, as long as somebody keeps them (`own_images`)"""


def write(
    url: str,
    shards: Sequence[Shard],
    index_N: NDArray[np.void],
    *,
    classes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    shards_at: str = "",
) -> Manifest:
    """Put `index.bin` and then, as the mark of completeness, `manifest.json` into a folder.

    Args:
        url: Folder of the manifest, and of the shards, which must exist already.
        shards: The shards in the order of their names.
        index_N: Rows of dtype `ROW`, shard after shard.
        classes: Names of the classes by label.
        provenance: How the set was made, as JSON values.
        shards_at: Folder of the shards where it is another, as `place_of_tars` gives it.
    """
    manifest = Manifest(
        url, shards, index_N, tuple(classes), dict(provenance or {}), shards_at=shards_at
    )
    digest = hashlib.sha256()
    with storage.open_write(storage.join_url(url, INDEX_NAME)) as file:
        for rows_R in shard_index.blocks_of_rows(index_N):
            rows = rows_R.tobytes()
            digest.update(rows)
            file.write(rows)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "classes": list(classes),
        "made": manifest.provenance,
        **({"shards_at": shards_at} if shards_at else {}),
        "index": {
            "name": INDEX_NAME,
            "bytes": manifest.samples * ROW.itemsize,
            "sha256": digest.hexdigest(),
        },
        "shards": [vars(shard) for shard in shards],
    }
    storage.write(storage.join_url(url, NAME), json.dumps(tree, indent=1).encode())
    return manifest


def load(
    url: str,
    *,
    parent: Path | None = None,
    checked: CheckedFiles | None = None,
    manifest_limit: int = MANIFEST_LIMIT,
    index_limit: int = INDEX_LIMIT,
) -> Manifest:
    """Open a sharded set; nothing in its manifest or index is trusted.

    Args:
        url: Folder that holds `manifest.json`, or that file.
        parent: Folder of this machine for manifest and index of a set in a store; see
            `index_folder`.
        checked: What another process of this machine found when it opened the same set, so that
            the index is not read again.
        manifest_limit: Bytes of the largest `manifest.json` that is read.
        index_limit: Bytes of the largest `index.bin` that is mapped.

    Raises:
        ValueError: There is no manifest, or it is not one of this program, of a later version, or
            at odds with itself; or there is no place for it on this machine.
        OSError: The store cannot be read.
    """
    if url in own_sets:
        return own_sets[url]
    check_address(url)
    url = storage.folder_url(storage.take_login(url), NAME)
    try:
        if checked is None:
            _check_size(storage.join_url(url, NAME), manifest_limit)
            path = _local_manifest(url, parent)
        else:
            path = checked.manifest_path
    except FileNotFoundError:
        shown_url = storage.hide_secrets(url)
        raise ValueError(
            storage.explain_pattern(url)
            or f"{shown_url} holds no {NAME}; make shards with python -m data_prep shard "
            f"SOURCE {shown_url}, or describe tars that are there with python -m data_prep index "
            f"{shown_url}."
        ) from None
    try:
        described = _parse_manifest(storage.read_blocks(str(path)))
        if checked is None or not checked.is_unchanged():
            checked = _check_files(described, url, path, parent, index_limit)
        index_N = shard_index.map_rows(checked.index_path, int(described.shards.first_S[-1]))
    except FileNotFoundError as error:
        raise ValueError(f"{url}/{NAME} names files that are not there: {error}.") from None
    except (storage.StorageError, index_folder.NoPlace):
        raise
    except KeyError as error:
        raise ValueError(f"{url}/{NAME} cannot be used: it has no entry {error}.") from None
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{url}/{NAME} cannot be used: {str(error).rstrip('.')}.") from None
    facts = described.classes, described.provenance, checked, described.shards_at
    return Manifest(url, described.shards, index_N, *facts)


def _check_size(url: str, limit: int) -> int:
    """Size of a file, unless it is larger than it can honestly be."""
    size = storage.file_size(url)
    if size > limit:
        raise ValueError(f"{url} has {size} bytes, {limit} at most are read.")
    return size


def _local_manifest(url: str, parent: Path | None) -> Path:
    """A `manifest.json` on this machine: where it lies, or fetched."""
    manifest_url = storage.join_url(url, NAME)
    if storage.is_local(url):
        return storage.local_path(manifest_url)
    return index_folder.fetch_manifest(manifest_url, index_folder.own_folder(parent))


def _check_files(
    described: "_Described", url: str, path: Path, parent: Path | None, index_limit: int
) -> CheckedFiles:
    """Check the index that belongs to a manifest."""
    index_url = storage.join_url(url, INDEX_NAME)
    if _check_size(index_url, index_limit) != index_folder.index_bytes(described.shards):
        raise ValueError(f"{INDEX_NAME} is not the one that was written with it")
    return index_folder.check_index(
        index_url,
        described.shards,
        sha256=described.index_sha256,
        manifest_path=path,
        parent=parent,
    )


@dataclass(frozen=True)
class _Described:
    """What a `manifest.json` says."""

    shards: ShardTable
    classes: tuple[str, ...]
    provenance: dict[str, Any]
    index_sha256: str
    shards_at: str


def _parse_manifest(blocks: Iterable[bytes]) -> _Described:
    """Read and check a `manifest.json` that arrives in blocks."""
    stream, tree = JsonStream(blocks), dict[str, Any]()
    for key in stream.entries():
        if key in tree:
            raise ValueError(f"it has the entry {key!r} twice")
        if key == "shards":
            tree[key] = ShardTable(_parse_shard(entry) for entry in stream.elements())
        elif key == "classes":
            tree[key] = _parse_classes(stream.elements())
        else:
            tree[key] = stream.take_value()
            _check_version(key, tree[key])
    stream.check_end()
    missing = [key for key in ("format", "version") if key not in tree]
    if missing:
        raise KeyError(missing[0])
    shards, index, classes = tree["shards"], tree["index"], tree["classes"]
    count = int(shards.first_S[-1])
    if int(index["bytes"]) != count * ROW.itemsize:
        raise ValueError(
            f"{INDEX_NAME} is said to have {index['bytes']} bytes where {count} "
            f"samples need {count * ROW.itemsize}"
        )
    if not count:
        raise ValueError("it holds no samples")
    if (name := shards.repeated_name()) is not None:
        raise ValueError(f"it names a shard twice: {name!r}")
    if not _SHA256.fullmatch(str(index["sha256"])):
        raise ValueError(f"its index has no sha256 but {str(index['sha256'])[:80]!r}")
    shards_at = parse_place(tree["shards_at"]) if "shards_at" in tree else ""
    return _Described(shards, classes, dict(tree["made"]), str(index["sha256"]), shards_at)


def _check_version(key: str, value: Any) -> None:
    """Refuse a file that is not ours, or too new, before the rest is judged."""
    if key == "format" and value != FORMAT:
        raise ValueError(f"format is {value!r}")
    if key == "version" and value > VERSION:
        raise ValueError(f"version {value} is later than this program's {VERSION}; update it")


def _parse_classes(names: Iterator[Any]) -> tuple[str, ...]:
    classes = tuple(str(name) for name in islice(names, CLASS_LIMIT + 1))
    if len(classes) > CLASS_LIMIT:
        raise ValueError(f"it names more than {CLASS_LIMIT} classes")
    return classes


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
        raise ValueError(
            f"shard {shard.name!r} has {shard.bytes} bytes and {shard.samples} samples"
        )
    if not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"shard {shard.name!r} has no sha256 but {shard.sha256!r}")
    return shard
