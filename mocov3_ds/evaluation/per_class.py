"""Which classes are told rightly, and what is each taken for? A table of a classifier, as CSV.

Shape suffixes: N = held-out images.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mocov3_ds.data.storage import atomic
from mocov3_ds.settings.spreadsheet import as_cell


class ClassResult(NamedTuple):
    """How the held-out images of one class were classified."""

    label: int
    images: int
    right: int
    confused_with: int
    """the wrong class that it is taken for most often, the first of equals; -1 = none"""
    confused: int
    """images that are taken for it"""


def count_by_class(classes_N: Tensor, labels_N: Tensor) -> list[ClassResult]:
    """One result for each class that has held-out images, in the order of the class numbers.

    Args:
        classes_N: class that each image was given, int64.
        labels_N: its true class, int64.
    """
    pairs, counts = torch.unique(torch.stack([labels_N, classes_N]), dim=1, return_counts=True)
    confusions: dict[int, dict[int, int]] = {}
    for (label, guess), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        confusions.setdefault(label, {})[guess] = count
    results = []
    for label, times in confusions.items():
        wrong = {guess: count for guess, count in times.items() if guess != label}
        rival = max(wrong, key=lambda guess: wrong[guess]) if wrong else -1
        results.append(
            ClassResult(label, sum(times.values()), times.get(label, 0), rival, wrong.get(rival, 0))
        )
    return results


def write_class_table(
    path: Path, classes_N: Tensor, labels_N: Tensor, names: Sequence[str]
) -> None:
    """Write the table: class, images, top-1 in percent, and what it is confused with most.

    Args:
        path: CSV file to write, whole or not at all.
        classes_N: class that each image was given, int64.
        labels_N: its true class, int64.
        names: names of the classes by number; empty = their numbers are their names.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "images", "top1", "most_confused_with", "confused"])
    for result in count_by_class(classes_N.cpu(), labels_N.cpu()):
        name, confused_name = (
            as_cell(names[label] if names else str(label)) if label >= 0 else ""
            for label in (result.label, result.confused_with)
        )
        top1, confused = (
            f"{100 * share / result.images:.2f}" for share in (result.right, result.confused)
        )
        table.writerow(
            [name, result.images, top1, confused_name, confused if confused_name else ""]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text.getvalue())
