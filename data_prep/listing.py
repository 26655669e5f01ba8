"""What is known of the images of a source before they are read? Names, labels, and where they lie.

Shape suffixes: N = images.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.class_numbers import ClassNames, Unlabelled, number_labels
from data_prep.images import SUFFIXES
from data_prep.labels import Label

_LONGEST_KEY = 90  # with the ending it must fit in a ustar name
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


class Item(NamedTuple):
    """One image of a source."""

    name: str
    """path in the source"""
    key: str
    """name in the shards: no dots, no slashes, unique in the set"""
    path: str
    """file that holds the bytes"""
    offset: int
    """position of the first byte in that file"""
    size: int
    """bytes"""
    label: int
    """-1 = none"""
    json_offset: int
    json_size: int
    """KEY.json of the sample, in the same file; 0 bytes = none"""

    @property
    def suffix(self) -> str:
        """Member ending in the shards."""
        return SUFFIXES[self.name.rpartition(".")[2].lower()]


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a source, by name; columns, because ImageNet has 1.3 million rows."""

    names: Sequence[str]
    keys: Sequence[str]
    files: Sequence[str]
    """files that hold the bytes; a tree's images are files of their own (`file_N` < 0)"""
    file_N: NDArray[np.int32]
    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    label_N: NDArray[np.int32]
    json_N2: NDArray[np.int64]
    """offset and size of each KEY.json"""
    classes: tuple[str, ...]
    """names by label"""
    root: str = ""
    """folder of the files with `file_N` < 0"""
    left_out: Sequence[str] = field(default=())
    """names of files that are not images by their ending"""
    notes: tuple[str, ...] = ()
    """how the labels were understood, where that is not plain to see"""

    def __len__(self) -> int:
        return len(self.names)

    def select_items(self, rows: NDArray[np.int64]) -> list[Item]:
        """Return the images of these rows, in the order of the rows."""
        return [
            Item(
                self.names[row],
                self.keys[row],
                self.files[file] if file >= 0 else f"{self.root}/{self.names[row]}",
                *columns,
            )
            for row, file, *columns in zip(
                rows.tolist(),
                self.file_N[rows].tolist(),
                self.offset_N[rows].tolist(),
                self.size_N[rows].tolist(),
                self.label_N[rows].tolist(),
                self.json_N2[rows, 0].tolist(),
                self.json_N2[rows, 1].tolist(),
                strict=True,
            )
        ]

    def digest(self) -> str:
        """SHA-256 that identifies the images: names, sizes, labels and class names."""
        digest = hashlib.sha256(
            "\n".join((*self.classes, "", *self.names)).encode("utf-8", "surrogateescape")
        )
        digest.update(self.size_N.tobytes() + self.label_N.tobytes() + self.json_N2[:, 1].tobytes())
        return digest.hexdigest()


@dataclass
class UnsortedImages:
    """Images in the order in which a source is walked; columns of equal length."""

    names: list[str] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    label: list[Label] = field(default_factory=list)
    json: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add_image(
        self,
        name: str,
        file: int,
        offset: int,
        size: int,
        label: Label,
        json: tuple[int, int] = (0, 0),
    ) -> None:
        """Append one image.

        Args:
            name: Path of the image in the source.
            file: Number of the archive that holds it; -1 = a file of its own.
            offset: Position of its first byte in that file.
            size: Bytes of the image.
            label: Class name, number, or None.
            json: Offset and size of its KEY.json in the same file; 0 bytes = none.
        """
        self.names.append(name)
        self.file.append(file)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)
        self.json.append(json)

    def select_folder(self, prefix: str) -> "UnsortedImages":
        """Return the images of an archive below one folder, as if it were the root.

        Args:
            prefix: Path of the folder in the archive, with a slash at the end.
        """
        selection = UnsortedImages()
        for row, name in enumerate(self.names):
            if name.startswith(prefix):
                short, label = name[len(prefix) :], self.label[row]
                if label == prefix.partition("/")[0]:
                    label = folder_class(short)
                where = self.file[row], self.offset[row], self.size[row]
                selection.add_image(short, *where, label, self.json[row])
        return selection

    def to_listing(
        self,
        files: Sequence[str],
        root: str,
        classes: ClassNames,
        source: str,
        unlabelled: Unlabelled = "refuse",
    ) -> Listing:
        """Number the classes, give each image its key, and sort by name.

        Args:
            files: Paths of the archives by their number.
            root: Folder of the images that are files of their own.
            classes: Class names in the order that numbers them; without readings = sorted.
            source: Name of the source, for messages.
            unlabelled: What to do with images without a label where others have one.

        Raises:
            ValueError: Labels that the class names do not cover, or names for some images only.
        """
        numbers, class_names, notes = number_labels(
            self.label, classes, source, self.names, unlabelled=unlabelled
        )
        order = sorted(
            range(len(self.names)),
            key=lambda row: (self.names[row], self.file[row], self.offset[row]),
        )
        rows = np.array(order, dtype=np.int64)
        names = [self.names[row] for row in order]
        return Listing(
            names=names,
            keys=_number_repeats([image_key(name) for name in names]),
            files=files,
            file_N=np.array(self.file, dtype=np.int32)[rows],
            offset_N=np.array(self.offset, dtype=np.int64)[rows],
            size_N=np.array(self.size, dtype=np.int64)[rows],
            label_N=np.array(numbers, dtype=np.int32)[rows],
            json_N2=np.array(self.json, dtype=np.int64).reshape(-1, 2)[rows],
            classes=class_names,
            root=root,
            left_out=sorted(self.left_out),
            notes=notes,
        )


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its ending."""
    return name.rpartition(".")[2].lower() in SUFFIXES and "." in name


def folder_class(name: str) -> str | None:
    """Class of an image by its path: the first folder; None without one."""
    return name.partition("/")[0] if "/" in name else None


def image_key(name: str) -> str:
    """Key of an image from its path: the class folder and the stem, safe in any archive.

    `n01440764/n01440764_10026.JPEG` gives `n01440764_10026`, `cat/1.5.png` gives `cat_1_5`.
    """
    *folders, last = name.split("/")
    stem = last.rpartition(".")[0]
    if folders and stem.startswith(f"{folders[-1]}_"):
        folders.pop()
    key = _UNSAFE.sub("_", "_".join([*folders, stem]))
    if len(key) > _LONGEST_KEY:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        key = f"{key[: _LONGEST_KEY - len(digest) - 1]}-{digest}"
    return key


def _number_repeats(keys: list[str]) -> list[str]:
    """Number the keys that occur more than once, in order."""
    occurrences = Counter(keys)
    if len(occurrences) == len(keys):
        return keys
    repeats: Counter[str] = Counter()
    unique = []
    for key in keys:
        repeats[key] += 1
        fresh = key
        if repeats[key] > 1:
            number = repeats[key]
            while (fresh := f"{key}-{number}") in occurrences:
                number += 1
            occurrences[fresh] += 1
        unique.append(fresh)
    return unique
