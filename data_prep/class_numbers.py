"""Which number has a class? A class keeps its number, whatever else the set holds.

    labels are numbers       the number is what the label says; nothing is sorted or closed up
    labels are names         sorted, as torchvision's ImageFolder, or in the order of a class file
    numbers beyond int32     ids become classes in ascending order, and are their names

Text that is a number is a number, so folders `0` to `11` are classes 0 to 11. What would move the
others is refused by name: a name among numbers, a number that is none, an image without a label.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data_prep.labels import Label
from mocov3_ds.data.class_names import comparable_name, list_names, parse_number

Unlabelled = Literal["refuse", "keep"]

HIGHEST_LABEL = int(np.iinfo(np.int32).max)
"""largest label that an index holds"""


@dataclass(frozen=True)
class ClassNames:
    """Class names in the order that numbers the classes, as a file or a manifest states them."""

    readings: tuple[tuple[str, ...], ...] = ()
    """the names, as the lines of a class file can be read; the first reading that fits counts"""
    source: str = "the class file"
    """who states them, for messages"""
    numbers: Literal["positions", "names", "unknown"] = "positions"
    """what a label that is a number means: the position of a name, a name, or whichever fits"""

    def choose_reading(self, used: Collection[str], holder: str) -> tuple[str, ...]:
        """The first reading that names all classes in use.

        Args:
            used: Comparable names of the classes in use.
            holder: Name of the source of the images, for messages.

        Raises:
            ValueError: No reading does.
        """
        for names in self.readings:
            if {*used} <= {comparable_name(name) for name in names}:
                return names
        unknown = [
            sorted({*used} - {comparable_name(name) for name in names}) for names in self.readings
        ]
        fewest = min(unknown, key=len)
        raise ValueError(
            f"{holder} holds {len(fewest)} classes that {self.source} does not name, e.g. "
            f"{list_names(fewest)}."
        )


class NumberedLabels(NamedTuple):
    """Labels as the index holds them."""

    numbers: Sequence[int]
    """class number of each image; -1 = none"""
    names: tuple[str, ...]
    """class names by number; () = the numbers mean what they say"""
    notes: tuple[str, ...]
    """what was understood that is not plain to see"""


def number_labels(
    labels: Sequence[Label],
    classes: ClassNames,
    source: str,
    images: Sequence[str],
    *,
    unlabelled: Unlabelled = "refuse",
    empty_classes: Sequence[str] = (),
) -> NumberedLabels:
    """Turn labels into numbers.

    Args:
        labels: Class name, number, or None of each image; -1 says that there is none.
        classes: Class names in the order that numbers them; without readings = sorted.
        source: Name of the source, for messages.
        images: Name of each image, for messages.
        unlabelled: What to do with images without a label where others have one.
        empty_classes: Class folders without images, which keep their place among sorted names.

    Raises:
        ValueError: Labels that the class names do not cover, that would move the numbers of the
            others, or that are missing for some images.
    """
    plain: dict[Label, Label] = {label: _plain_label(label) for label in {*labels}}
    first: dict[Label, int] = {}  # image of each class
    for row, label in enumerate(labels):
        first.setdefault(plain[label], row)
    notes = _check_unlabelled(labels, first, source, images, unlabelled)
    used = [label for label in first if label is not None]
    if not used:
        return NumberedLabels([-1] * len(labels), (classes.readings or ((),))[0], notes)
    _check_spellings([*plain, *empty_classes], source)
    texts = sorted(label for label in used if isinstance(label, str))
    counted = sorted(label for label in used if isinstance(label, int))

    def show_label(label: Label) -> str:
        return f"{label!r} of {images[first[label]]!r}"

    _check_kinds(texts, counted, classes, source, show_label)
    number_of: Mapping[Label, int]
    if texts:
        empty = [_plain_label(name) for name in empty_classes]
        number_of, names = _number_names([*used, *empty], classes, source)
    else:
        number_of, names = _number_numbers(counted, classes, source, show_label)
        if names and not classes.readings:
            notes += (
                f"labels go up to {counted[-1]}, an index holds {HIGHEST_LABEL} at most: the "
                f"{len(counted)} ids are class names, numbered in ascending order",
            )
    numbers = {label: number_of.get(spelling, -1) for label, spelling in plain.items()}
    return NumberedLabels([numbers[label] for label in labels], names, notes)


def _plain_label(label: Label) -> Label:
    """A label as it is compared: numbers as numbers, names in composed characters, or None."""
    if isinstance(label, str):
        name = comparable_name(label)
        number = parse_number(name)
        label = name if number is None else number
    return None if label == -1 else label


def _check_unlabelled(
    labels: Sequence[Label],
    first: Mapping[Label, int],
    source: str,
    images: Sequence[str],
    unlabelled: Unlabelled,
) -> tuple[str, ...]:
    """Refuse images without a label among others that have one, or say how many there are."""
    if None not in first or len(first) == 1:
        return ()
    rows = [row for row, label in enumerate(labels) if _plain_label(label) is None]
    stated = [row for row in rows if labels[row] is not None]
    sentence = f"{len(rows)} of {len(labels)} images of {source} have no class, e.g. "
    sentence += f"{images[(stated or rows)[0]]}{' (label -1 or none)' if stated else ''}"
    # a member that is not there moves no number; what stands for a label, or a folder, might
    has_names = any(isinstance(label, str) for label in first)
    if unlabelled == "keep" or not (stated or has_names):
        return (f"{sentence}; they are kept without one",)
    raise ValueError(
        f"{sentence}; put every image in a class folder or none, give each its label, or keep them "
        "without one by --unlabelled keep."
    )


def _check_kinds(
    texts: Sequence[str],
    counted: Sequence[int],
    classes: ClassNames,
    source: str,
    show_label: Callable[[Label], str],
) -> None:
    """Refuse negative numbers, and names where most labels are numbers."""
    if counted and counted[0] < 0:
        raise ValueError(
            f"{source} holds label {show_label(counted[0])}; a label is a name or a number from 0 "
            "(-1 = none)."
        )
    if texts and len(counted) >= len(texts) and not classes.readings:
        raise ValueError(
            f"{source} holds names among labels that are numbers: {show_label(texts[0])}, but "
            f"{show_label(counted[0])}. Correct it, give --classes FILE with all names in the "
            "order that numbers them, or take no labels by --label -."
        )


def _check_spellings(labels: Collection[Label], source: str) -> None:
    """Refuse texts that differ and are one class: composed and decomposed, `7` and `007`."""
    spelt: dict[Label, str] = {}
    for label in sorted(label for label in labels if isinstance(label, str)):
        if spelt.setdefault(_plain_label(label), label) != label:
            twin = spelt[_plain_label(label)]
            raise ValueError(
                f"{source} spells one class in two ways, {twin!a} and {label!a}; give "
                "both the same name."
            )


def _number_numbers(
    counted: Sequence[int], classes: ClassNames, source: str, show_label: Callable[[Label], str]
) -> tuple[dict[Label, int], tuple[str, ...]]:
    """Numbers of labels that are numbers: themselves, unless names or their size say otherwise."""
    if not classes.readings:
        if counted[-1] <= HIGHEST_LABEL:
            return {label: label for label in counted}, ()
        return {label: number for number, label in enumerate(counted)}, tuple(map(str, counted))
    names = classes.readings[0]
    by_name = {comparable_name(name): number for number, name in enumerate(names)}
    are_names = classes.numbers != "positions" and all(str(label) in by_name for label in counted)
    are_positions = classes.numbers != "names" and counted[-1] < len(names)
    if not are_names and not are_positions:
        raise ValueError(
            f"{source} holds label {show_label(counted[-1])}, {classes.source} names {len(names)} "
            "classes."
        )
    if not are_names:
        return {label: label for label in counted}, names
    numbered: dict[Label, int] = {label: by_name[str(label)] for label in counted}
    moved = [label for label in counted if numbered[label] != label]
    if are_positions and moved:
        raise ValueError(
            f"label {moved[0]} of {source} may be class {str(moved[0])!r} or position {moved[0]} "
            f"(from 0), {names[moved[0]]!r}, in {classes.source}; put its names in ascending order "
            "from 0, one for each number."
        )
    return numbered, names


def _number_names(
    used: Collection[Label], classes: ClassNames, source: str
) -> tuple[dict[Label, int], tuple[str, ...]]:
    """Numbers of classes that are names; numbers among them are names, too."""
    in_use = {str(label) for label in used if label is not None}
    names = classes.choose_reading(in_use, source) if classes.readings else tuple(sorted(in_use))
    number_of = {comparable_name(name): number for number, name in enumerate(names)}
    return {label: number_of[str(label)] for label in used if label is not None}, names
