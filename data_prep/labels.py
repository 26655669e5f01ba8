"""Which class is each image of, and which number has the class?

Labels come from class folders, from `.cls` and `.json` members of webdataset tars, or from a file
with one label an image; class names come from a file, a manifest, or the labels themselves.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.images import SUFFIXES

Label = str | int | None
"""Class name, number, or none."""

LONGEST_JSON = 1 << 20
"""Bytes of the largest `.json` of a sample that is read for its label."""
LONGEST_CLS = 1024
"""Bytes of the largest `.cls` of a sample that is read."""


def read_class_names(path: Path) -> list[str]:
    """Read class names, one a line: the first word (`n01440764 tench, Tinca` is n01440764).

    Raises:
        ValueError: There is no such file, it holds no names, or one of them twice.
    """
    names = [line.split()[0] for line in _read_lines(path)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} names class {repeated[0]} twice.")
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file.") from None
    if not lines:
        raise ValueError(f"{path} is empty.")
    return lines


def read_image_labels(
    path: Path, image_names: Sequence[str], classes: Sequence[str]
) -> tuple[list[Label], Sequence[str]]:
    """Read the label of each image from a file.

    Three forms are read. `IMAGE CLASS` a line, blank or comma between (the image by its name with
    or without ending; a header line and what follows is left out, so Kaggle's LOC_val_solution.csv
    works). One class name a line, for the images in name order. One number a line in name order
    (the development kit's ILSVRC2012_validation_ground_truth.txt, from 1), which needs `classes`:
    the name of each number, because the kit numbers classes in an order of its own.

    Args:
        path: Text file with the labels.
        image_names: Paths of the images in the source.
        classes: Class names in the order that numbers them; () = not given.

    Returns:
        The label of each image, and the class names in the order that numbers them.

    Raises:
        ValueError: The file and the images or the class names do not fit.
    """
    rows = [re.split(r"[,\s]+", line.strip()) for line in _read_lines(path)]
    tokens, names_images = _match_rows(path, rows, image_names)
    if not all(token.isdigit() for token in tokens):
        return list(tokens), classes
    first = 0 if names_images else 1  # the kit counts from 1
    if first and not classes:
        raise ValueError(
            f"{path} numbers the classes in an order of its own, which need not be that of the "
            "training set; add --classes FILE with the name of class 1, 2, ... a line (for "
            "ImageNet's kit: the synsets by ILSVRC2012_ID)."
        )
    numbers = [int(token) - first for token in tokens]
    if classes and not all(0 <= number < len(classes) for number in numbers):
        raise ValueError(
            f"{path} holds class {max(numbers) + first}, the class file has {len(classes)} names."
        )
    labels: list[Label] = [classes[n] for n in numbers] if classes else list(numbers)
    # the training set numbers its folders by sorted name, whatever order the kit has
    return labels, sorted(classes) if first else classes


def _match_rows(
    path: Path, rows: Sequence[Sequence[str]], image_names: Sequence[str]
) -> tuple[list[str], bool]:
    """Label of each image as text, and whether the rows name their images."""
    stems = [_image_stem(name) for name in image_names]
    by_name = {row[0].rpartition("/")[2]: row[1] for row in rows if len(row) > 1}
    by_name |= {_image_stem(name): label for name, label in by_name.items()}
    if any(stem in by_name for stem in stems):
        missing = [n for n, stem in zip(image_names, stems, strict=True) if stem not in by_name]
        if missing:
            raise ValueError(
                f"{path} has no label for {len(missing)} of {len(stems)} images, e.g. {missing[0]}."
            )
        return [by_name[stem] for stem in stems], True
    if len(rows) != len(stems):
        raise ValueError(
            f"{path} has {len(rows)} lines for {len(stems)} images and names none of them; it "
            "must hold one label an image, in the order of the images' names."
        )
    order = sorted(range(len(stems)), key=lambda row: image_names[row])
    tokens = [""] * len(stems)
    for row, line in zip(order, rows, strict=True):
        tokens[row] = line[0]
    return tokens, False


def _image_stem(name: str) -> str:
    """File name of an image without its ending."""
    last = name.rpartition("/")[2]
    stem, dot, suffix = last.rpartition(".")
    return stem if dot and suffix.lower() in SUFFIXES else last


def parse_cls(data: bytes, name: str) -> Label:
    """Read the label in a `.cls` member of a webdataset tar.

    Args:
        data: Bytes of the member.
        name: Name of the member and its archive, for messages.

    Raises:
        ValueError: The member is empty.
    """
    text = data.decode("utf-8", "replace").strip()
    if not text:
        raise ValueError(f"{name} is empty; it should hold the label.")
    return int(text) if text.isascii() and text.lstrip("-").isdigit() else text


def parse_json_label(data: bytes, name: str) -> Label:
    """Read `label` or `cls` in a `.json` member of a webdataset tar; None where it has neither.

    Args:
        data: Bytes of the member.
        name: Name of the member and its archive, for messages.

    Raises:
        ValueError: The member is not JSON.
    """
    try:
        tree = json.loads(data)
    except ValueError:
        raise ValueError(f"{name} is not valid JSON.") from None
    label = tree.get("label", tree.get("cls")) if isinstance(tree, dict) else None
    return label if isinstance(label, str | int) and not isinstance(label, bool) else None


def number_labels(
    labels: Sequence[Label], classes: Sequence[str], source: str, images: Sequence[str]
) -> tuple[Sequence[int], Sequence[str]]:
    """Turn labels into numbers; returns these and the names of the numbers.

    Args:
        labels: Class name, number, or None of each image.
        classes: Class names in the order that numbers them; () = sorted.
        source: Name of the source, for messages.
        images: Name of each image, for messages.

    Raises:
        ValueError: Labels that the class names do not cover, or names for some images only.
    """
    if not any(isinstance(label, str) for label in labels):
        numbers = [-1 if label is None else int(label) for label in labels]
        if classes and max(numbers) >= len(classes):
            raise ValueError(
                f"{source} holds label {max(numbers)}, the class file names {len(classes)} classes."
            )
        return numbers, classes
    unlabelled = [name for name, label in zip(images, labels, strict=True) if label is None]
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(labels)} images of {source} have no class, e.g. "
            f"{unlabelled[0]}; put every image in a class folder or none."
        )
    # numbers among names are read as names: a class folder may be called 7
    label_names = {str(label) for label in labels}
    names = list(classes) or sorted(label_names)
    number_of = {name: number for number, name in enumerate(names)}
    unknown = sorted(label_names - {*number_of})
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} classes that the class file does not name, "
            f"e.g. {unknown[0]}."
        )
    return [number_of[str(label)] for label in labels], names
