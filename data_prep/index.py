"""How do tars that others made get a manifest, so that they can be streamed and verified?"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_prep import engines
from data_prep.class_numbers import ClassNames, Unlabelled, number_labels
from data_prep.labels import Label
from data_prep.progress import Progress
from data_prep.receipts import Reject, write_rejects
from data_prep.scan import Sample, Scan, scan_shard
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.manifest import Manifest, Shard
from mocov3_ds.version import __version__


def index_tars(
    url: str,
    *,
    workers: int,
    classes: ClassNames | None = None,
    unlabelled: Unlabelled = "refuse",
    replace: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Describe the tars of a folder by a manifest, so that they can be streamed and verified.

    Unreadable images stay out of the index and are listed in `rejects.jsonl`.

    Args:
        url: URL of the folder of the tars.
        workers: Number of processes; 1 = this one alone.
        classes: Class names in the order that numbers them; None = sorted where labels are names.
        unlabelled: What to do with samples without a label where others have one.
        replace: Write a new manifest where there is one already.
        quiet: Show no progress on standard error.

    Raises:
        ValueError: There are no tars or no images, a tar is damaged, labels do not fit the class
            names, or there is a manifest already.
    """
    if not replace and storage.exists(storage.join_url(url, manifest.NAME)):
        raise ValueError(
            f"{url} has a {manifest.NAME} already; verify checks it, --replace writes a new one."
        )
    scans = _scan_tars(url, workers, quiet)
    readable = {
        name: [sample for sample in scan.samples if not sample.reason]
        for name, scan in scans.items()
    }
    samples = [sample for samples in readable.values() for sample in samples]
    if not samples:
        raise ValueError(f"the tars in {url} hold no readable images.")
    index_N = np.array([_index_row(sample) for sample in samples], dtype=manifest.ROW)
    names = [f"{name}/{sample.key}" for name, kept in readable.items() for sample in kept]
    labels = [sample.label for sample in samples]
    index_N["label"], class_names, notes = number_labels(
        labels, classes or ClassNames(), url, names, unlabelled=unlabelled
    )
    for note in notes:
        print(f"data_prep: {note}", file=sys.stderr)
    rejected = _write_rejects(url, scans)
    shards = [
        Shard(name, scans[name].bytes, len(samples), scans[name].sha256)
        for name, samples in readable.items()
        if samples
    ]
    provenance = {
        "program": f"mocov3-ds {__version__}",
        "rejected": rejected,
        "source": "index",
        # of labels that are numbers: whether they are class names, as ids are, or class numbers
        "labels": "ids" if class_names and _are_ids(labels, index_N["label"]) else "numbers",
    }
    return manifest.write(url, shards, index_N, classes=class_names, provenance=provenance)


def _are_ids(labels: Sequence[Label], label_N: NDArray[np.int32]) -> bool:
    """Whether a label that is a number got another one."""
    pairs = zip(labels, label_N.tolist(), strict=True)
    return any(isinstance(label, int) and label != number >= 0 for label, number in pairs)


def _scan_tars(url: str, workers: int, quiet: bool) -> dict[str, Scan]:
    """Scans of all tars of a folder by name, in the order of the names."""
    names = [entry.name for entry in storage.list_files(url) if entry.name.endswith(".tar")]
    if not names:
        raise ValueError(f"{url} holds no file that ends in .tar.")
    scans: dict[str, Scan] = {}
    with Progress("index", len(names), quiet=quiet) as progress:
        work = partial(scan_shard, url=url, decode_all=False)
        for scan in engines.process_pool(work, names, workers):
            if scan.damage:
                raise ValueError(scan.damage)
            scans[scan.name] = scan
            progress.update(1, scan.bytes)
    return {name: scans[name] for name in names}


def _index_row(sample: Sample) -> tuple[int, ...]:
    """Row of `manifest.ROW`, still without a label."""
    return sample.offset, sample.size, sample.crc32, -1, sample.width, sample.height, 0


def _write_rejects(url: str, scans: Mapping[str, Scan]) -> int:
    """List the unreadable images of all tars in a file, if there are any; returns how many."""
    rejects = [
        Reject(f"{name}/{sample.key}", sample.reason)
        for name, scan in scans.items()
        for sample in scan.samples
        if sample.reason
    ]
    write_rejects(rejects, url)
    return len(rejects)
