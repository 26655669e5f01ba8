"""Is a set what its manifest says? Every byte of the shards is read, several shards at a time.

Shape suffixes: N = samples, S = shards.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import engines
from data_prep.balance import Balance, check_balance
from data_prep.images import FAINT_RANGE
from data_prep.labels import Label
from data_prep.member_names import join_names, quote_name
from data_prep.progress import Progress
from data_prep.scan import Scan, scan_shard
from data_prep.tar_names import list_tars
from data_prep.wds_samples import MemberPick
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.class_names import comparable_name
from mocov3_ds.data.manifest import Manifest, Shard

_SHOWN = 20  # repeated images, repeated keys, or problems that are listed


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a set."""

    shard: str
    sample: str
    """key; empty = the whole shard"""
    message: str


@dataclass(frozen=True)
class Verdict:
    """What `verify_set` finds."""

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
    faint_images: int = 0
    """images that are nearly of one colour; 0 where they were not decoded"""
    faint_example: str = ""
    is_listed: bool = True
    """whether tars that the manifest does not name were looked for"""
    shards_at: str = ""
    """folder of the shards; empty = beside the manifest"""

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong; repeated images and keys are only reported."""
        return not self.problems

    def as_json(self) -> str:
        """The verdict for machines, as a JSON object."""
        problems = [
            {"shard": p.shard, "sample": p.sample, "what": p.message} for p in self.problems
        ]
        return json.dumps({"sound": self.is_sound, **asdict(self), "problems": problems}, indent=1)

    def __str__(self) -> str:
        counts = sorted(self.labels.values())
        lines = [
            f"{storage.hide_secrets(self.url)}: {self.samples} samples in {self.shards} shards, "
            f"{self.bytes / 1e6:.1f} MB"
            + (f", in {quote_name(storage.hide_secrets(self.shards_at))}" if self.shards_at else "")
        ]
        if counts:
            lines.append(
                f"{len(counts)} labels, {counts[0]} to {counts[-1]} samples each "
                f"(median {counts[len(counts) // 2]})"
            )
        else:
            lines.append("no labels")
        if self.repeated_image_groups:
            example = join_names(self.repeated_images[0])
            lines.append(
                f"{self.repeated_image_groups} images occur more than once, e.g. {example}"
            )
        if self.repeated_key_count:
            example = quote_name(self.repeated_keys[0])
            lines.append(f"{self.repeated_key_count} keys occur more than once, e.g. {example}")
        if self.faint_images:
            lines.append(
                f"{self.faint_images} images are nearly of one colour (all pixels within "
                f"{FAINT_RANGE} of 255 levels), e.g. {quote_name(self.faint_example)}; if they "
                "show more elsewhere, their pixels are scaled otherwise than is stated in them"
            )
        if not self.is_listed:
            lines.append(
                "the server cannot list files: what the manifest does not name is not seen"
            )
        for problem in self.problems[:_SHOWN]:
            name = f"{problem.shard}/{problem.sample}" if problem.sample else problem.shard
            lines.append(f"WRONG {quote_name(name)}: {quote_name(problem.message)}")
        if len(self.problems) > _SHOWN:
            lines.append(f"... and {len(self.problems) - _SHOWN} more (--json lists all)")
        lines.append("sound" if self.is_sound else f"NOT sound: {len(self.problems)} problems")
        return "\n".join(lines)


def verify_set(url: str, *, workers: int, decode_all: bool = True, quiet: bool = False) -> Verdict:
    """Hold every byte of a set against its manifest.

    Args:
        url: URL of the folder of the set.
        workers: Number of processes; 1 = this one alone.
        decode_all: Decode every image, not only its header and end.
        quiet: Show no progress on standard error.

    Raises:
        ValueError: There is no manifest, or it is at odds with itself.
    """
    checked = manifest.load(url)
    scans = _scan_shards(checked, workers, decode_all, quiet)
    unlisted = _scan_unlisted(checked)
    names, counts = np.unique(checked.index_N["label"], return_counts=True)
    labels = dict(zip(names.tolist(), counts.tolist(), strict=True))
    image_groups, repeated_keys = _find_repeats([*scans.values()])
    faint = [
        f"{scan.name}/{sample.key}"
        for scan in scans.values()
        for sample in scan.samples
        if sample.is_faint
    ]
    return Verdict(
        url=checked.url,
        shards=len(checked.shards),
        samples=checked.samples,
        bytes=checked.bytes,
        problems=[*_find_problems(checked, scans, unlisted)],
        labels={class_name(checked, label): n for label, n in labels.items() if label >= 0},
        repeated_images=image_groups[:_SHOWN],
        repeated_image_groups=len(image_groups),
        repeated_keys=repeated_keys[:_SHOWN],
        repeated_key_count=len(repeated_keys),
        faint_images=len(faint),
        faint_example=faint[0] if faint else "",
        is_listed=storage.can_list(checked.shards_url),
        shards_at=checked.shards_at,
    )


def class_name(shards: Manifest, label: int) -> str:
    """Name of a label, or its number where it has none."""
    return shards.classes[label] if 0 <= label < len(shards.classes) else str(label)


def _scan_shards(checked: Manifest, workers: int, decode_all: bool, quiet: bool) -> dict[str, Scan]:
    """Scans of the shards that exist, by name in the manifest's order."""
    samples = {shard.name: shard.samples for shard in checked.shards}
    folder = checked.shards_url
    present = [name for name in samples if storage.exists(storage.join_url(folder, name))]
    scans: dict[str, Scan] = {}
    with Progress("verify", checked.samples, quiet=quiet) as progress:
        pick = _members_of(checked)
        work = partial(scan_shard, url=folder, decode_all=decode_all, pick=pick)
        for scan in engines.process_pool(work, present, workers):
            scans[scan.name] = scan
            progress.update(samples[scan.name], scan.bytes)
    return {name: scans[name] for name in present}


def _members_of(checked: Manifest) -> MemberPick:
    """Members that the set was described by."""
    members = checked.provenance.get("members")
    members = members if isinstance(members, dict) else {}
    return MemberPick(str(members.get("image", "")), str(members.get("label", "")))


def _scan_unlisted(checked: Manifest) -> dict[str, Scan]:
    """Scans of the tars beside the manifest that it does not name, and might have."""
    folder = checked.shards_url
    if not storage.can_list(folder):
        return {}
    patterns = checked.provenance.get("files")
    patterns = [str(pattern) for pattern in patterns] if isinstance(patterns, list) else []
    listed = {shard.name for shard in checked.shards}
    names = [name for name in list_tars(folder, patterns) if name not in listed]
    pick = _members_of(checked)
    return {name: scan_shard(name, url=folder, decode_all=False, pick=pick) for name in names}


def _find_problems(
    checked: Manifest, scans: Mapping[str, Scan], unlisted: Mapping[str, Scan]
) -> Iterator[Problem]:
    """All that is wrong: missing shards, differences, tars that are too many, lost files."""
    for shard in checked.shards:
        if shard.name not in scans:
            where = f" in {storage.hide_secrets(checked.shards_at)}" if checked.shards_at else ""
            yield Problem(shard.name, "", f"is missing{where}")
    numbers = _label_numbers(checked)
    for number, shard in enumerate(checked.shards):
        if shard.name in scans:
            rows = checked.index_N[checked.first_S[number] : checked.first_S[number + 1]]
            yield from _compare_shard(shard, rows, scans[shard.name], checked, numbers)
    for name, scan in unlisted.items():
        # a tar without readable images holds nothing that the manifest could name
        if scan.damage or any(not sample.reason for sample in scan.samples):
            yield Problem(name, "", "is not in the manifest")
    balance = checked.provenance.get("balance")
    if balance is not None:
        wrong = check_balance(balance, checked.samples, checked.provenance.get("rejected"))
        is_described = checked.provenance.get("source") == "index"
        if not wrong and is_described and len(scans) == len(checked.shards):
            wrong = _compare_balance(balance, [*scans.values(), *unlisted.values()])
        if wrong:
            yield Problem(manifest.NAME, "", wrong)


def _compare_balance(balance: Mapping[str, Any], scans: Sequence[Scan]) -> str:
    """Say in what the members of the tars differ from the balance of a described set."""
    balance_of_tars = Balance()
    for scan in scans:
        if scan.damage:
            return ""  # that is said of the tar itself
        balance_of_tars.add(scan.balance)
    tree = balance_of_tars.as_json(0)
    tree["kept"], tree["rejected"] = balance["kept"], balance_of_tars.images - balance["kept"]
    wrong = [
        f"{key} {tree[key]}, {balance.get(key)} in the manifest"
        for key in tree
        if tree[key] != balance.get(key)
    ]
    return f"the tars hold other files than were described: {'; '.join(wrong)}" if wrong else ""


def _label_numbers(checked: Manifest) -> dict[str, int]:
    """Number of each label that is text, or an id, as the set was described."""
    return {comparable_name(name): number for number, name in enumerate(checked.classes)}


def _number_of(label: Label, numbers: Mapping[str, int], checked: Manifest) -> int | None:
    """Number of a sample's label; None = it cannot be said."""
    if isinstance(label, int) and checked.provenance.get("labels") != "ids":
        return label
    return None if label is None else numbers.get(comparable_name(str(label)))


def _compare_shard(
    shard: Shard, rows: NDArray[np.void], scan: Scan, checked: Manifest, numbers: Mapping[str, int]
) -> Iterator[Problem]:
    """What is wrong with one shard."""
    # before there was a balance, a bad label file left its image out
    is_old = "balance" not in checked.provenance
    readable = {
        sample.offset
        for sample in scan.samples
        if not sample.reason and not (is_old and sample.label_reason)
    }
    name = shard.name
    if scan.damage:
        yield Problem(name, "", scan.damage)
    if scan.bytes != shard.bytes:
        yield Problem(name, "", f"has {scan.bytes} bytes, the manifest says {shard.bytes}")
    if scan.sha256 != shard.sha256:
        yield Problem(name, "", f"has SHA-256 {scan.sha256}, the manifest says {shard.sha256}")
    by_offset = {sample.offset: sample for sample in scan.samples}
    indexed = {*rows["offset"].tolist()}
    counted = indexed | readable
    count = sum(sample.offset in counted for sample in scan.samples)
    if count != shard.samples:
        yield Problem(name, "", f"holds {count} samples, the manifest says {shard.samples}")
    for row in rows:
        sample = by_offset.pop(int(row["offset"]), None)
        if sample is None:
            yield Problem(name, "", f"has no sample at byte {row['offset']}, the index has one")
            continue
        if sample.reason:
            yield Problem(name, sample.key, sample.reason)
        label = _number_of(sample.label, numbers, checked)
        for column, value in (("size", sample.size), ("crc32", sample.crc32), ("label", label)):
            indexed_value = int(row[column])
            if value is not None and value != indexed_value:
                message = f"{column} {value}, the index says {indexed_value}"
                yield Problem(name, sample.key, message)
    for sample in by_offset.values():
        if sample.offset in readable:  # others are left out on purpose
            yield Problem(name, sample.key, "is not in the index")


def _find_repeats(scans: Sequence[Scan]) -> tuple[list[list[str]], list[str]]:
    """Groups of samples with equal images, and keys that occur more than once."""
    digests = np.array(
        [sample.digest for scan in scans for sample in scan.samples if sample.size], dtype=np.uint64
    )
    values, counts = np.unique(digests, return_counts=True)
    repeated = {int(value) for value in values[counts > 1]}
    groups: dict[int, list[str]] = defaultdict(list)
    keys: Counter[str] = Counter()
    for scan in scans:
        for sample in scan.samples:
            keys[sample.key] += 1
            if sample.digest in repeated:
                groups[sample.digest].append(f"{scan.name}/{sample.key}")
    return sorted(groups.values()), sorted(key for key, count in keys.items() if count > 1)
