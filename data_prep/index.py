"""How do tars that others made get a manifest, so that they can be streamed and verified?"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_prep import engines
from data_prep.balance import Balance
from data_prep.class_numbers import ClassNames, NumberedLabels, Unlabelled, number_labels
from data_prep.labels import Label
from data_prep.member_names import is_hidden, join_names, quote_name
from data_prep.progress import Progress
from data_prep.receipts import REJECTS, Reject, write_rejects
from data_prep.scan import Sample, Scan, scan_shard
from data_prep.source_files import check_split_names, expand_names, select_names
from data_prep.wds_samples import NO_PICK, Choices, MemberPick
from mocov3_ds.data import manifest, storage
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
        pick: Members that are the image and the label.
        replace: Write a new manifest where there is one already.
        quiet: Show no progress on standard error.
        say: Function that is told what was understood, line by line, before anything is written.

    Raises:
        ValueError: There are no images, a tar is damaged, more than one reading is possible, labels
            do not fit the class names, or there is a manifest already.
    """
    url, patterns = _find_patterns(url, files)
    _check_place(url, replace)
    scans = _scan_tars(url, patterns, pick, workers, quiet)
    balance, choices = _add_up([*scans.values()], url)
    readable = {name: _readable_samples(scan) for name, scan in scans.items()}
    samples = [sample for of_tar in readable.values() for sample in of_tar]
    if not samples:
        raise ValueError(f"the tars in {url} hold no readable images.")
    index_N = np.array([_index_row(sample) for sample in samples], dtype=manifest.ROW)
    index_N["label"], class_names, notes = _number_samples(
        readable, url, classes or ClassNames(), unlabelled
    )
    rejects = _list_rejects(scans)
    lines = _describe(scans, index_N, class_names, (*notes, *_notes(samples, choices)))
    for line in [*lines, *_describe_rejects(rejects), *balance.lines(len(rejects))]:
        say(line)
    write_rejects(rejects, url)
    shards = [_shard_entry(scan, len(readable[scan.name])) for scan in scans.values()]
    shards = [shard for shard in shards if shard.samples]
    are_ids = class_names and _are_ids([sample.label for sample in samples], index_N["label"])
    provenance = {
        **_PROVENANCE,
        "rejected": len(rejects),
        "labels": "ids" if are_ids else "numbers",
        "balance": balance.as_json(len(rejects)),
        **({"files": patterns} if patterns else {}),
        **({"members": pick._asdict()} if any(pick) else {}),
    }
    return manifest.write(url, shards, index_N, classes=class_names, provenance=provenance)


def _find_patterns(url: str, files: str) -> tuple[str, list[str]]:
    """Folder of the tars, and the patterns that their names must match; [] = all tars."""
    patterns = expand_names(files) if files else []
    if storage.is_local(url) and storage.local_path(url).exists():
        path = storage.local_path(url)
        if path.is_file() and path.suffix == ".tar":
            return str(path.parent), [*patterns, path.name]
        return url, patterns
    if not any(mark in url.rpartition("/")[2] + url * ("::" in url) for mark in "*?{:"):
        return url, patterns
    parts = [name.rpartition("/") for name in expand_names(url)]
    folders = {folder for folder, _, _ in parts}
    if len(folders) > 1:
        raise ValueError(
            f"{quote_name(url)} names tars of {len(folders)} folders ({join_names([*folders], 3)});"
            " a manifest describes the tars beside it, so give one folder at a time."
        )
    return folders.pop() or ".", patterns + [name for _, _, name in parts]


def _check_place(url: str, replace: bool) -> None:
    """Refuse to write over a manifest, unless it is one of this program that is to be replaced."""
    storage.check_writable(url)
    manifest_url = storage.join_url(url, manifest.NAME)
    try:
        tree = json.loads(storage.read(manifest_url))
        is_ours = isinstance(tree, dict) and tree.get("format") == manifest.FORMAT
    except FileNotFoundError:
        for name in (manifest.INDEX_NAME, REJECTS):
            if not replace and storage.exists(storage.join_url(url, name)):
                raise ValueError(
                    f"{url} holds {name} and no {manifest.NAME}; move it away, or write over it "
                    "with --replace."
                ) from None
        return
    except storage.StorageError:
        raise
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{manifest_url} is not of this program and is not written over; move it away first."
        )
    if not replace:
        raise ValueError(
            f"{url} has a {manifest.NAME} already; verify checks it, --replace writes a new one."
        )


def _number_samples(
    readable: Mapping[str, Sequence[Sample]],
    url: str,
    classes: ClassNames,
    unlabelled: Unlabelled,
) -> NumberedLabels:
    """Class numbers of all samples; those whose label files cannot be read have none."""
    samples = [sample for of_tar in readable.values() for sample in of_tar]
    names = [f"{name}/{sample.key}" for name, of_tar in readable.items() for sample in of_tar]
    good = [row for row, sample in enumerate(samples) if not sample.label_reason]
    if not any(samples[row].label is not None for row in good) and len(good) < len(samples):
        bad = next(sample for sample in samples if sample.label_reason)
        raise ValueError(
            f"no label of {url} can be read: {bad.label_reason.rstrip('.')} (--label - takes "
            "the images without labels)."
        )
    numbered = number_labels(
        [samples[row].label for row in good],
        classes,
        url,
        [names[row] for row in good],
        unlabelled=unlabelled,
    )
    numbers = np.full(len(samples), -1, dtype=np.int32)
    numbers[good] = numbered.numbers
    return numbered._replace(numbers=numbers.tolist())


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


def list_tars(url: str, patterns: Sequence[str]) -> list[str]:
    """Names of the tars in a folder that match one of the patterns, without hidden ones.

    Args:
        url: URL of the folder.
        patterns: Patterns of their names; () = all.
    """
    names = [entry.name for entry in storage.list_files(url)]
    tars = [name for name in names if name.endswith(".tar") and not is_hidden(name)]
    return select_names(tars, patterns)


def _scan_tars(
    url: str, patterns: Sequence[str], pick: MemberPick, workers: int, quiet: bool
) -> dict[str, Scan]:
    """Scans of the tars of a folder by name, in the order of the names."""
    names = list_tars(url, patterns)
    if not names:
        matching = f" and matches {join_names([*patterns])}" if patterns else ""
        raise ValueError(f"{url} holds no file that ends in .tar{matching}.")
    missing = sorted({*patterns} - {*names})
    missing = [name for name in missing if not any(mark in name for mark in "*?[")]
    if missing:
        raise ValueError(
            f"{url} holds no {quote_name(missing[0])}, one of {len(patterns)} tars that are asked "
            f"for ({len(missing)} are missing)."
        )
    if not patterns:
        check_split_names(names, url)
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
