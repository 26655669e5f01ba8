"""What was understood of a source? Said before anything is written.

python -m data_prep look SOURCE       the same lines that `shard` begins with
"""

from collections import Counter
from typing import Any

import numpy as np

from data_prep.balance import LABEL_WITHOUT_IMAGE, UNUSED_LABEL
from data_prep.listing import Listing
from data_prep.member_names import name_ending, quote_name
from data_prep.splits import find_split

_TABLES = ("csv", "tsv", "txt", "json", "jsonl", "mat", "xml", "parquet")
"""Endings of files that may hold labels."""


def describe_source(listing: Listing, source: str) -> list[str]:
    """Say what a source was taken for, a line a fact.

    Args:
        listing: The images of the source.
        source: Name of the source.
    """
    endings = count_endings(listing)
    sizes = ", ".join(f"{count} .{ending}" for ending, count in endings.items())
    lines = [
        f"{quote_name(source)}: {listing.form}",
        f"images: {len(listing)} ({sizes}), {listing.size_N.sum() / 1e6:.1f} MB",
        f"classes: {describe_classes(listing)}",
    ]
    split = find_split(source)[0]
    if split:
        lines.append(f"split: {split}, by the name of the source")
    unused = unused_label_files(listing)
    if unused:
        lines.append(f"label files seen and not used: {', '.join(unused)}")
    lines += [f"note: {note}" for note in listing.notes]
    return lines + listing.balance.lines()


def describe_classes(listing: Listing) -> str:
    """Say how many classes there are, the first and last with their numbers, and their origin."""
    label_N = listing.label_N
    labels = np.unique(label_N[label_N >= 0])
    if not len(labels):
        return "none; the images have no labels"
    origin = listing.class_origin or "labels"
    first, last = int(labels[0]), int(labels[-1])
    if not listing.classes:
        return f"{len(labels)} numbers, {first} to {last}, from {origin}"
    last = len(listing.classes) - 1
    names = [f"{number} = {quote_name(listing.classes[number])}" for number in (0, last)]
    empty = len(listing.classes) - len(labels)
    empty_text = f" ({empty} of them without images)" if empty else ""
    ends = names[0] if not last else f"{names[0]} ... {names[1]}"
    return f"{len(listing.classes)}{empty_text}, {ends}, from {origin}"


def count_endings(listing: Listing) -> dict[str, int]:
    """Number of images by the ending of their names, the most frequent first."""
    return dict(Counter(name_ending(name) for name in listing.names).most_common())


def unused_label_files(listing: Listing) -> list[str]:
    """What was left out that may hold labels, as `COUNT x EXAMPLE`."""
    return [
        f"{omission.count} x {quote_name(omission.example)}"
        for reason, omission in sorted(listing.balance.left_out.items())
        if reason in (UNUSED_LABEL, LABEL_WITHOUT_IMAGE)
        or (name_ending(omission.example) in _TABLES and "by its name" in reason)
    ]


def source_as_json(listing: Listing, source: str) -> dict[str, Any]:
    """What `describe_source` says, for machines.

    Args:
        listing: The images of the source.
        source: Name of the source.
    """
    label_N = listing.label_N
    return {
        "source": source,
        "form": listing.form,
        "images": len(listing),
        "bytes": int(listing.size_N.sum()),
        "endings": count_endings(listing),
        "classes": [*listing.classes],
        "labels": {
            "from": listing.class_origin,
            "different": len(np.unique(label_N[label_N >= 0])),
            "lowest": int(label_N.min()),
            "highest": int(label_N.max()),
            "images_without": int((label_N < 0).sum()),
        },
        "label_files_not_used": unused_label_files(listing),
        "split": find_split(source)[0],
        "notes": [*listing.notes],
        "balance": listing.balance.as_json(0),
        "examples_left_out": {
            reason: omission.example for reason, omission in listing.balance.left_out.items()
        },
    }
