"""Are the classes of two sets the same? They are compared by name, whatever number each has.

A set names its classes in its manifest, or its labels are numbers that mean what they say. Names
compare in Unicode's composed form (NFC), because macOS stores `café` otherwise than Linux does;
text that is a number is that number, so that class `10` is class 10.

Shape suffixes: N = samples of a set.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data.manifest import Manifest

_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")
_BLOCK = 1 << 22  # labels that are looked at in one go; a set may have 10^9
_SHOWN = 3  # names in a message


def parse_number(text: str) -> int | None:
    """The whole number that a text is, in ASCII digits; None where it is another text."""
    return int(text) if _NUMBER.fullmatch(text) else None


def comparable_name(name: str) -> str:
    """The spelling by which a class name is compared: composed characters, numbers plain."""
    name = unicodedata.normalize("NFC", name)
    number = parse_number(name)
    return name if number is None else str(number)


def list_names(names: Iterable[str]) -> str:
    """The first few names for a message, and how many more there are."""
    every = [*names]
    beginning = ", ".join(repr(name) for name in every[:_SHOWN])
    count = len(every) - _SHOWN
    return f"{beginning} and {count} more" if count > 0 else beginning


def labels_in_use(manifest: Manifest) -> list[int]:
    """Distinct labels of a set, ascending, without -1."""
    blocks, top = _blocks_of_labels(manifest), manifest.top_label
    if top < _BLOCK:  # a table by value is fastest, and small
        is_used = np.zeros(top + 2, dtype=bool)
        for block_N in blocks:
            is_used[block_N.clip(min=-1)] = True  # -1 is the last place
        return np.flatnonzero(is_used[:-1]).tolist()
    used: set[int] = set()
    for block_N in blocks:
        used.update(np.unique(block_N).tolist())
    return sorted(label for label in used if label >= 0)


def _blocks_of_labels(manifest: Manifest) -> Iterator[NDArray[np.int32]]:
    label_N = manifest.index_N["label"]
    for first in range(0, len(label_N), _BLOCK):
        yield label_N[first : first + _BLOCK]


class PairedSet(NamedTuple):
    """A set whose labels are the numbers of another set's classes."""

    manifest: Manifest
    notes: tuple[str, ...]
    """sentences on what was done and what is missing, for the user"""


def pair_classes(train: Manifest, judged: Manifest) -> PairedSet:
    """Give the classes of a set the numbers that the same classes have in the training set.

    Where both sets name their classes, or neither does, classes are the same by name (or number).
    Where one names none, its labels are names if the names of the other are all numbers; else they
    are taken as positions in the other's names, and a note says so.

    Args:
        train: the set that numbers the classes.
        judged: held-out images, whose labels are renumbered.

    Raises:
        ValueError: `judged` has classes that `train` has not, or names are no guide.
    """
    names_train, names_judged = _class_names(train), _class_names(judged)
    notes = []
    named, unnamed = (train, judged) if train.classes else (judged, train)
    if named.classes and not unnamed.classes and not _all_numbers(named):
        names_train = names_judged = _names_by_position(named, unnamed)
        notes.append(
            f"{unnamed.url} names no classes; its labels are taken as positions in the "
            f"{len(named.classes)} class names of {named.url}"
        )
    number_of = {name: label for label, name in names_train.items()}
    used = labels_in_use(judged)
    _check_classes(train, judged, [names_judged[label] for label in used], number_of)
    absent = sorted({*number_of} - {names_judged[label] for label in used})
    if absent and used:
        notes.append(
            f"{judged.url} holds no images of {len(absent)} of the {len(number_of)} classes of "
            f"{train.url}: {list_names(absent)}"
        )
    numbers = [number_of[names_judged[label]] for label in used]
    changed = [
        (label, number) for label, number in zip(used, numbers, strict=True) if label != number
    ]
    if changed:
        label, number = changed[0]
        notes.append(
            f"{judged.url} numbers its classes otherwise than {train.url}; they are compared by "
            f"name ({names_judged[label]!r} is {label} there and {number} in training)"
        )
        judged = replace(renumber_labels(judged, used, numbers), classes=train.classes)
    return PairedSet(judged, tuple(notes))


def _check_classes(
    train: Manifest, judged: Manifest, names: Sequence[str], number_of: Mapping[str, int]
) -> None:
    """Refuse images of classes that training has no image of: they can never be right."""
    missing = [name for name in names if name not in number_of]
    if not missing:
        unseen = {number_of[name]: name for name in names}
        for block_N in _blocks_of_labels(train):  # the first one has all, as a rule
            for label in np.unique(block_N).tolist():
                unseen.pop(label, None)
            if not unseen:
                return
        missing = [*unseen.values()]
    if missing:
        raise ValueError(
            f"{judged.url} holds images of {len(missing)} classes of which {train.url} has none: "
            f"{list_names(missing)} (there: {list_names(number_of)}); both must hold the same "
            "classes."
        )


def renumber_labels(manifest: Manifest, labels: Sequence[int], numbers: Sequence[int]) -> Manifest:
    """The same samples with other labels, and without class names.

    Args:
        manifest: the set with the old labels.
        labels: its distinct labels, ascending, without -1.
        numbers: what becomes of each of them.
    """
    index_N = manifest.index_N.copy()
    label_N = manifest.index_N["label"]
    place_N = np.searchsorted(np.array(labels), label_N.clip(min=0))
    index_N["label"] = np.where(label_N < 0, label_N, np.array(numbers, dtype=np.int32)[place_N])
    return replace(manifest, index_N=index_N, classes=(), files=None)


def _all_numbers(manifest: Manifest) -> bool:
    return all(parse_number(comparable_name(name)) is not None for name in manifest.classes)


def _names_by_position(named: Manifest, unnamed: Manifest) -> dict[int, str]:
    """Names of labels where one set has none: those of the other."""
    if unnamed.top_label >= len(named.classes):
        raise ValueError(
            f"label {unnamed.top_label} of {unnamed.url}, which names no classes, is beyond the "
            f"{len(named.classes)} classes of {named.url}; the two sets do not belong together."
        )
    return dict(enumerate(named.classes))


def _class_names(manifest: Manifest) -> dict[int, str]:
    """Comparable name of each label; labels without names are named by their number."""
    if not manifest.classes:
        return {label: str(label) for label in labels_in_use(manifest)}
    if manifest.top_label >= len(manifest.classes):
        raise ValueError(
            f"{manifest.url} holds label {manifest.top_label} and names "
            f"{len(manifest.classes)} classes; make its manifest again with a class file for all."
        )
    names: dict[str, str] = {}
    for name in manifest.classes:
        if comparable_name(name) in names:
            raise ValueError(
                f"{manifest.url} has two classes of one name, {names[comparable_name(name)]!r} and "
                f"{name!r}."
            )
        names[comparable_name(name)] = name
    return dict(enumerate(names))
