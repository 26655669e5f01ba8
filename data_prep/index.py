"""How do tars that others made get a manifest, so that they can be streamed and verified?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import engines
from data_prep.balance import Balance
from data_prep.class_numbers import ClassNames, NumberedLabels, Unlabelled, number_labels
from data_prep.labels import Label
from data_prep.manifest_place import choose_place
from data_prep.member_names import join_names, quote_name
from data_prep.progress import Progress
from data_prep.receipts import REJECTS, Reject, write_rejects
from data_prep.scan import Sample, Scan, scan_shard
from data_prep.tar_names import check_present, find_tars, name_tars
from data_prep.wds_samples import NO_PICK, Choices, MemberPick
from mocov3_ds.data import manifest
from mocov3_ds.data.manifest import Manifest, Shard
from mocov3_ds.version import __version__

_PROVENANCE = {"program": f"mocov3-ds {__version__}", "source": "index"}
"""Of each manifest made here. Beside it, `labels` says whether numbers are names, as ids are, or
class numbers; `files` and `members` say which tars and members were meant."""


def _ignore(line: str) -> None:
    """Take a line that nobody wants to read."""


def index_tars(
    url: str,
    *,
    workers: int,
    classes: ClassNames | None = None,
    unlabelled: Unlabelled = "refuse",
    files: str = "",
    manifest_folder: str = "",
    pick: MemberPick = NO_PICK,
    replace: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = _ignore,
) -> Manifest:
    """Describe the tars of a folder by a manifest, so that they can be streamed and verified.

    Unreadable images stay out of the index and are listed in `rejects.jsonl`.

    Args:
        url: URL of the folder of the tars, or of tars in one folder with braces or `*`.
        workers: Number of processes; 1 = this one alone.
        classes: Class names in the order that numbers them; None = sorted where labels are names.
        unlabelled: What to do with samples without a label where others have one.
        files: Patterns of the names of the tars, as `source_files` has them; empty = all.
        manifest_folder: URL of the folder of the manifest; empty = beside the tars.
        pick: Members that are the image and the label.
        replace: Write a new manifest where there is one already.
        quiet: Show no progress on standard error.
        say: Function that is told what was understood, line by line, before anything is written.

    Raises:
        ValueError: There are no images, a tar is damaged, more than one reading is possible, labels
            do not fit the class names, or there is a manifest already.
    """
    url, patterns = find_tars(url, files)
    names = name_tars(url, patterns)
    target = choose_place(url, manifest_folder, replace)
    scans = _scan_tars(url, names, pick, workers, quiet)
    balance, choices = _add_up([*scans.values()], url)
    readable = {name: _readable_samples(scan) for name, scan in scans.items()}
    samples = [sample for of_tar in readable.values() for sample in of_tar]
    index_N = np.array([_index_row(sample) for sample in samples], dtype=manifest.ROW)
    index_N["label"], class_names, notes = _number_samples(
        scans, url, classes or ClassNames(), unlabelled, pick
    )
    rejects = _list_rejects(scans)
    notes = (*notes, *_notes(samples, choices), *target.notes)
    lines = [*_describe(scans, index_N, class_names, notes), *_describe_rejects(rejects)]
    for line in [*lines, *balance.lines(len(rejects))]:
        say(line)
    write_rejects(rejects, target.url)
    are_ids = class_names and _are_ids([sample.label for sample in samples], index_N["label"])
    counts = {"rejected": len(rejects), "balance": balance.as_json(len(rejects))}
    return manifest.write(
        target.url,
        [_shard_entry(scans[name], len(of_tar)) for name, of_tar in readable.items() if of_tar],
        index_N,
        classes=class_names,
        provenance=_describe_making(patterns, pick, bool(are_ids)) | counts,
        shards_at=target.shards_at,
    )


def _describe_making(patterns: Sequence[str], pick: MemberPick, are_ids: bool) -> dict[str, Any]:
    """What `verify` must know of how a set was described."""
    return {
        **_PROVENANCE,
        "labels": "ids" if are_ids else "numbers",
        **({"files": [*patterns]} if patterns else {}),
        **({"members": pick._asdict()} if any(pick) else {}),
    }


def _number_samples(
    scans: Mapping[str, Scan],
    url: str,
    classes: ClassNames,
    unlabelled: Unlabelled,
    pick: MemberPick,
) -> NumberedLabels:
    """Class numbers of the readable samples; those whose label files cannot be read have none.

    Labels of rejected images count, so that a class keeps its number without its last image.
    """
    samples = [sample for scan in scans.values() for sample in scan.samples]
    if all(sample.reason for sample in samples):
        raise ValueError(f"the tars in {url} hold no readable images.")
    names = [f"{name}/{sample.key}" for name, scan in scans.items() for sample in scan.samples]
    good = [row for row, sample in enumerate(samples) if not sample.label_reason]
    if not any(samples[row].label is not None for row in good) and len(good) < len(samples):
        bad = next(sample for sample in samples if sample.label_reason)
        raise ValueError(
            f"no label of {url} can be read: {bad.label_reason.rstrip('.')} (--label - takes "
            "the images without labels)."
        )
    pick.check_label([sample.label for sample in samples], url)
    numbered = number_labels(
        [samples[row].label for row in good],
        classes,
        url,
        [names[row] for row in good],
        unlabelled=unlabelled,
    )
    numbers = np.full(len(samples), -1, dtype=np.int32)
    numbers[good] = numbered.numbers
    is_kept = [not sample.reason for sample in samples]
    return numbered._replace(numbers=numbers[is_kept].tolist())


def _notes(samples: Sequence[Sample], choices: Choices) -> tuple[str, ...]:
    """What was not used of the labels."""
    notes = []
    bad = [sample for sample in samples if sample.label_reason]
    if bad:
        notes.append(
            f"{len(bad)} label files cannot be read, and their images have no label: "
            f"{bad[0].label_reason}"
        )
    if choices.unused:
        endings = sorted(choices.unused)
        notes.append(
            f"{sum(choices.unused.values())} label files are not used "
            f"(.{', .'.join(endings)}); --label {endings[0]} reads them."
        )
    folders = {sample.key.partition("/")[0] for sample in samples if "/" in sample.key}
    if folders and not any(sample.label is not None for sample in samples):
        notes.append(
            f"the images lie in {len(folders)} folders ({join_names(sorted(folders), 3)}), which "
            "are not read as classes here: `shard` does that."
        )
    return tuple(notes)


def _describe(
    scans: Mapping[str, Scan],
    index_N: NDArray[np.void],
    class_names: Sequence[str],
    notes: Sequence[str],
) -> list[str]:
    """What was understood of the tars, a line a fact."""
    labels = np.unique(index_N["label"][index_N["label"] >= 0])
    empty = sum(not scan.samples for scan in scans.values())
    lines = [f"{len(scans)} tars{f', {empty} of them without images' if empty else ''}"]
    if not len(labels):
        lines.append("classes: none; the images have no labels")
    elif class_names:
        last = len(class_names) - 1
        ends = f"0 = {quote_name(class_names[0])} ... {last} = {quote_name(class_names[last])}"
        lines.append(f"classes: {len(class_names)}, {ends}")
    else:
        lines.append(f"classes: {len(labels)} numbers, {labels[0]} to {labels[-1]}")
    return [*lines, *(f"note: {note}" for note in notes)]


def _scan_tars(
    url: str, names: Sequence[str], pick: MemberPick, workers: int, quiet: bool
) -> dict[str, Scan]:
    """Scans of tars by name, in the order of the names."""
    check_present(url, names)
    scans: dict[str, Scan] = {}
    with Progress("index", len(names), quiet=quiet) as progress:
        work = partial(scan_shard, url=url, decode_all=False, pick=pick)
        for scan in engines.process_pool(work, names, workers):
            if scan.damage:
                raise ValueError(scan.damage)
            scans[scan.name] = scan
            progress.update(1, scan.bytes)
    return {name: scans[name] for name in names}


def _are_ids(labels: Sequence[Label], label_N: NDArray[np.int32]) -> bool:
    """Whether a label that is a number got another one."""
    pairs = zip(labels, label_N.tolist(), strict=True)
    return any(isinstance(label, int) and label != number >= 0 for label, number in pairs)


def _index_row(sample: Sample) -> tuple[int, ...]:
    """Row of `manifest.ROW`, still without a label."""
    return sample.offset, sample.size, sample.crc32, -1, sample.width, sample.height, 0


def _shard_entry(scan: Scan, samples: int) -> Shard:
    return Shard(scan.name, scan.bytes, samples, scan.sha256)


def _readable_samples(scan: Scan) -> list[Sample]:
    return [sample for sample in scan.samples if not sample.reason]


def _list_rejects(scans: Mapping[str, Scan]) -> list[Reject]:
    """The unreadable images of all tars."""
    return [
        Reject(f"{name}/{sample.key}", sample.reason)
        for name, scan in scans.items()
        for sample in scan.samples
        if sample.reason
    ]


def _describe_rejects(rejects: Sequence[Reject]) -> list[str]:
    """How many images are rejected and why, if any are."""
    if not rejects:
        return []
    reasons = Counter(reject.reason for reject in rejects).most_common(3)
    listed = ", ".join(f"{count} x {quote_name(reason)}" for reason, count in reasons)
    return [f"{len(rejects)} images rejected (all in {REJECTS}): {listed}"]


def _add_up(scans: Sequence[Scan], url: str) -> tuple[Balance, Choices]:
    """What became of the members of all tars; refuses samples with several images or labels."""
    balance, choices = Balance(), Choices()
    for scan in scans:
        balance.add(scan.balance)
        choices.add(scan.choices)
    choices.check(url)
    return balance, choices
