"""Read a set's shards to the last byte and hold them against the manifest, or make one.

`verify` reads what `shard` or `index` described and says everything that is wrong. `index`
describes tars that others wrote. Both read each shard once, in order, from any URL, several shards
at a time.

Shape suffixes: N = samples, S = shards.
"""

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep import engines, images, sources, tar
from data_prep.progress import Progress
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.manifest import Manifest, Shard
from mocov3_ds.data.views import decode
from mocov3_ds.version import __version__

_REPEATS_SHOWN = 20


class HashingStream:
    """A forward-only `tar.ByteSource` over a URL that hashes every byte that passes."""

    def __init__(self, url: str) -> None:
        self._blocks = storage.chunks(url)
        self._left = memoryview(b"")
        self._digest = hashlib.sha256()
        self.at = 0
        """bytes passed"""

    def read(self, size: int, /) -> bytes:
        """The next bytes, fewer than `size` only at the end."""
        parts = []
        while size > 0 and self._more():
            part = self._left[:size]
            self._left = self._left[len(part) :]
            self.at += len(part)
            size -= len(part)
            parts.append(part)
        return parts[0].tobytes() if len(parts) == 1 else b"".join(parts)

    def seek(self, position: int, /) -> None:
        """Pass bytes up to a later one; stops at the end."""
        assert position >= self.at, "a stream goes forward only"
        while self.at < position and self._more():
            step = min(len(self._left), position - self.at)
            self._left = self._left[step:]
            self.at += step

    def hexdigest(self) -> str:
        """SHA-256 of everything, what has not been read included."""
        while self._more():
            self.at += len(self._left)
            self._left = memoryview(b"")
        return self._digest.hexdigest()

    def _more(self) -> bool:
        if not self._left:
            block = next(self._blocks, b"")
            self._digest.update(block)
            self._left = memoryview(block)
        return bool(self._left)


class Sample(NamedTuple):
    """What a scan finds out about one sample."""

    key: str
    offset: int
    size: int
    crc32: int
    label: str | int | None
    height: int
    width: int
    digest: int
    """first 8 bytes of the image's SHA-256"""
    reason: str
    """why it cannot be read; empty = it can"""


class Scan(NamedTuple):
    """What a scan finds out about one shard."""

    name: str
    bytes: int
    sha256: str
    samples: list[Sample]
    damage: str
    """why the rest of the shard could not be read; empty = it could"""


def scan(name: str, *, url: str, decode_all: bool) -> Scan:
    """Read one shard to its last byte.

    Args:
        name: of the shard.
        url: its folder.
        decode_all: decode every image, not only its header and end.

    Raises:
        FileNotFoundError: there is no such shard.
        OSError: it cannot be read.
    """
    where = storage.join(url, name)
    size = storage.size(where)
    stream = HashingStream(where)
    members: list[tar.Member] = []
    facts: dict[int, tuple[int, int, int, int, str]] = {}
    labels: dict[int, bytes] = {}
    damage = ""
    try:
        for member in tar.members(stream, where, size):
            members.append(member)
            suffix = member.name.rpartition(".")[2].lower()
            if suffix in images.SUFFIXES and member.size <= images.MAX_BYTES:
                facts[member.offset] = _image_facts(stream.read(member.size), decode_all)
            elif suffix in ("cls", "json") and member.size <= sources.LONGEST_JSON:
                labels[member.offset] = stream.read(member.size)
    except tar.DamagedTar as error:
        damage = str(error)
    samples = []
    for sample in sources.samples_of(members):
        label: str | int | None = None
        reason = ""
        try:
            label = sources.read_label(sample, lambda member: labels[member.offset], where)
        except ValueError as error:
            reason = str(error)
        crc32, height, width, digest, unreadable = facts.get(
            sample.image.offset, (0, 0, 0, 0, f"{sample.image.size} bytes are no image")
        )
        samples.append(
            Sample(
                sample.key,
                sample.image.offset,
                sample.image.size,
                crc32,
                label,
                height,
                width,
                digest,
                unreadable or reason,
            )
        )
    return Scan(name, size, stream.hexdigest(), samples, damage)


def _image_facts(data: bytes, decode_all: bool) -> tuple[int, int, int, int, str]:
    height = width = 0
    reason = ""
    try:
        height, width = images.checked_size(data, "decode" if decode_all else "header")
    except decode.UnreadableImage as error:
        reason = str(error)
    digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    return zlib.crc32(data), height, width, digest, reason


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a set."""

    shard: str
    sample: str
    """key; empty = the whole shard"""
    what: str


@dataclass(frozen=True)
class Verdict:
    """What `verify` finds."""

    url: str
    shards: int
    samples: int
    bytes: int
    problems: list[Problem] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """samples by class name, or by number where classes have no names"""
    repeated_images: list[list[str]] = field(default_factory=list)
    """`shard/key` of samples with the same bytes, the first groups"""
    repeated_image_groups: int = 0
    repeated_keys: list[str] = field(default_factory=list)
    """the first ones"""
    repeated_key_count: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; repeated images and keys are only told."""
        return not self.problems

    def as_json(self) -> str:
        """For machines."""
        return json.dumps({"sound": self.sound, **asdict(self)}, indent=1)

    def __str__(self) -> str:
        counts = sorted(self.labels.values())
        lines = [
            f"{self.url}: {self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB"
        ]
        if counts:
            lines.append(
                f"{len(counts)} labels, {counts[0]} to {counts[-1]} samples each "
                f"(median {counts[len(counts) // 2]})"
            )
        else:
            lines.append("no labels")
        for count, what, shown in (
            (self.repeated_image_groups, "images occur more than once", self.repeated_images),
            (self.repeated_key_count, "keys occur more than once", self.repeated_keys),
        ):
            if count:
                first = shown[0] if isinstance(shown[0], str) else ", ".join(shown[0])
                lines.append(f"{count} {what}, e.g. {first}")
        for problem in self.problems[:_REPEATS_SHOWN]:
            name = f"{problem.shard}/{problem.sample}" if problem.sample else problem.shard
            lines.append(f"WRONG {name}: {problem.what}")
        if len(self.problems) > _REPEATS_SHOWN:
            lines.append(f"... and {len(self.problems) - _REPEATS_SHOWN} more (--json lists all)")
        lines.append("sound" if self.sound else f"NOT sound: {len(self.problems)} problems")
        return "\n".join(lines)


def verify(url: str, *, workers: int, decode_all: bool = True, quiet: bool = False) -> Verdict:
    """Hold every byte of a set against its manifest.

    Args:
        url: folder of the set.
        workers: processes.
        decode_all: decode every image.
        quiet: no progress.

    Raises:
        ValueError: no manifest, or one that is at odds with itself.
    """
    made = manifest.load(url)
    names = {shard.name: number for number, shard in enumerate(made.shards)}
    problems: list[Problem] = []
    present = [name for name in names if storage.exists(storage.join(made.url, name))]
    problems += [Problem(name, "", "is missing") for name in names if name not in {*present}]
    scans: dict[str, Scan] = {}
    with Progress("verify", made.samples, quiet=quiet) as progress:
        work = partial(scan, url=made.url, decode_all=decode_all)
        for scanned in engines.process_pool(work, present, workers):
            scans[scanned.name] = scanned
            progress.update(made.shards[names[scanned.name]].samples, scanned.bytes)
    for name in present:
        number = names[name]
        rows = made.index_N[made.first_S[number] : made.first_S[number + 1]]
        problems += _compare(made.shards[number], rows, scans[name])
    listed = [
        entry.name
        for entry in storage.entries(made.url)
        if entry.name.endswith(".tar") and entry.name not in names
    ]
    problems += [Problem(name, "", "is not in the manifest") for name in listed]
    labels, counts = np.unique(made.index_N["label"], return_counts=True)
    images_twice, keys_twice = _repeats([scans[name] for name in present])
    return Verdict(
        url=made.url,
        shards=len(made.shards),
        samples=made.samples,
        bytes=made.bytes,
        problems=problems,
        labels={
            class_name(made, label): count
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
            if label >= 0
        },
        repeated_images=images_twice[:_REPEATS_SHOWN],
        repeated_image_groups=len(images_twice),
        repeated_keys=keys_twice[:_REPEATS_SHOWN],
        repeated_key_count=len(keys_twice),
    )


def class_name(made: Manifest, label: int) -> str:
    """Name of a label, or its number where it has none."""
    return made.classes[label] if 0 <= label < len(made.classes) else str(label)


def _compare(shard: Shard, rows: NDArray[np.void], scanned: Scan) -> Iterator[Problem]:
    """What is wrong with one shard."""
    name = shard.name
    if scanned.damage:
        yield Problem(name, "", scanned.damage)
    if scanned.bytes != shard.bytes:
        yield Problem(name, "", f"has {scanned.bytes} bytes, the manifest says {shard.bytes}")
    if scanned.sha256 != shard.sha256:
        yield Problem(name, "", f"has SHA-256 {scanned.sha256}, the manifest says {shard.sha256}")
    by_offset = {sample.offset: sample for sample in scanned.samples}
    indexed = {*rows["offset"].tolist()}
    count = sum(sample.offset in indexed or not sample.reason for sample in scanned.samples)
    if count != shard.samples:
        yield Problem(name, "", f"holds {count} samples, the manifest says {shard.samples}")
    for row in rows:
        sample = by_offset.pop(int(row["offset"]), None)
        if sample is None:
            yield Problem(name, "", f"has no sample at byte {row['offset']}, the index has one")
            continue
        if sample.reason:
            yield Problem(name, sample.key, sample.reason)
        for what in ("size", "crc32", "label"):
            is_there, said = getattr(sample, what), int(row[what])
            if what == "label" and not isinstance(is_there, int):
                continue
            if is_there != said:
                yield Problem(name, sample.key, f"{what} {is_there}, the index says {said}")
    for sample in by_offset.values():
        if not sample.reason:  # unreadable ones are left out on purpose
            yield Problem(name, sample.key, "is not in the index")


def _repeats(scans: Sequence[Scan]) -> tuple[list[list[str]], list[str]]:
    """Samples with equal images, and keys that occur twice."""
    digests = np.array(
        [sample.digest for scanned in scans for sample in scanned.samples if sample.size],
        dtype=np.uint64,
    )
    values, counts = np.unique(digests, return_counts=True)
    twice = {int(value) for value in values[counts > 1]}
    groups: dict[int, list[str]] = defaultdict(list)
    keys: Counter[str] = Counter()
    for scanned in scans:
        for sample in scanned.samples:
            keys[sample.key] += 1
            if sample.digest in twice:
                groups[sample.digest].append(f"{scanned.name}/{sample.key}")
    return sorted(groups.values()), sorted(key for key, count in keys.items() if count > 1)


def index(
    url: str,
    *,
    workers: int,
    classes: Sequence[str] = (),
    replace: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Describe the tars that lie in a folder, so that they can be streamed and verified.

    Unreadable images stay out of the index and are listed in `rejects.jsonl`.

    Args:
        url: folder of the tars.
        workers: processes.
        classes: names by label; () = none, or sorted where labels are names.
        replace: a manifest may be there already.
        quiet: no progress.

    Raises:
        ValueError: no tars, a damaged one, no images, labels that do not fit the names, a manifest
            that is there already.
    """
    if not replace and storage.exists(storage.join(url, manifest.NAME)):
        raise ValueError(
            f"{url} has a {manifest.NAME} already; verify checks it, --replace writes a new one."
        )
    names = [entry.name for entry in storage.entries(url) if entry.name.endswith(".tar")]
    if not names:
        raise ValueError(f"{url} holds no file that ends in .tar.")
    scans: dict[str, Scan] = {}
    with Progress("index", len(names), quiet=quiet) as progress:
        work = partial(scan, url=url, decode_all=False)
        for scanned in engines.process_pool(work, names, workers):
            if scanned.damage:
                raise ValueError(scanned.damage)
            scans[scanned.name] = scanned
            progress.update(1, scanned.bytes)
    rejects, shards, rows, labels = [], [], [], []
    for name in names:
        kept = [sample for sample in scans[name].samples if not sample.reason]
        rejects += [
            {"name": f"{name}/{sample.key}", "reason": sample.reason}
            for sample in scans[name].samples
            if sample.reason
        ]
        labels += [sample.label for sample in kept]
        rows += [
            (sample.offset, sample.size, sample.crc32, -1, sample.width, sample.height, 0)
            for sample in kept
        ]
        if kept:
            shards.append(Shard(name, scans[name].bytes, len(kept), scans[name].sha256))
    if not rows:
        raise ValueError(f"the tars in {url} hold no readable images.")
    numbers, class_names = sources.number_labels(
        labels, classes, url, [f"sample {n}" for n in range(len(labels))]
    )
    index_N = np.array(rows, dtype=manifest.ROW)
    index_N["label"] = numbers
    if rejects:
        lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
        storage.write(storage.join(url, "rejects.jsonl"), lines.encode())
    made: dict[str, Any] = {"program": f"mocov3-ds {__version__}", "rejected": len(rejects)}
    return manifest.write(
        url, shards, index_N, classes=class_names, made={**made, "source": "index"}
    )
