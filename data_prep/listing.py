"""What is known of the images of a source before they are read? Names, labels, and where they lie.

Shape suffixes: N = images.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.balance import NOT_READ, OUTSIDE, Balance, ending_reason
from data_prep.class_numbers import ClassNames, NumberedLabels, Unlabelled, number_labels
from data_prep.images import SUFFIXES
from data_prep.labels import Label
from data_prep.member_names import normalize_name
from data_prep.wds_samples import Choices

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
        ending = self.name.rpartition(".")[2].lower()
        return SUFFIXES.get(ending, ending)


class FileIdentity(NamedTuple):
    """What a file was when it was listed, by which a change is noticed."""

    size: int
    """bytes"""
    changed_ns: int
    """time of its last change, nanoseconds"""


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
    balance: Balance = field(default_factory=Balance)
    """what became of all files of the source"""
    archives: Sequence[FileIdentity] = ()
    """what the files were when they were listed"""
    form: str = "images"
    """what the source is, in a few words"""
    class_origin: str = ""
    """where the labels come from, in a few words; empty = there are none"""
    notes: tuple[str, ...] = ()
    """what was guessed or not used, and how the labels were understood"""

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
    """what the sample's own label file says; None = nothing"""
    json: list[tuple[int, int]] = field(default_factory=list)
    balance: Balance = field(default_factory=Balance)
    folders: set[str] = field(default_factory=set)
    """folders that are not hidden, without the prefix of their archive; '' = the top"""
    other_folders: set[str] = field(default_factory=set)
    """those of them that hold files of other kinds"""
    repeated_folders: list[str] = field(default_factory=list)
    """folders that links lead to again"""
    prefix: dict[int, str] = field(default_factory=dict)
    """path that is put before the names in an archive, by the archive's number"""
    labels_read: int = 0
    """label files that could be read"""
    bad_rows: set[int] = field(default_factory=set)
    """images whose label files could not, which stay without a label"""
    bad_label: str = ""
    """why the first of these could not, one sentence"""
    choices: Choices = field(default_factory=Choices)

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
        self.balance.images += 1

    def leave_out(self, name: str, inner: str) -> None:
        """Count a file that is no image by its ending.

        Args:
            name: Path in the source.
            inner: Path in the archive, or in the source; its folder is no emptied class.
        """
        reason = ending_reason(inner)
        self.balance.leave_out(name, reason)
        if NOT_READ not in reason:
            self.other_folders.add(inner.rpartition("/")[0])

    def note_bad_label(self, sentence: str) -> None:
        """Note that the label file of the next image cannot be read: it stays without a label.

        Args:
            sentence: Why it cannot be read.
        """
        self.bad_rows.add(len(self.names))
        self.bad_label = self.bad_label or sentence

    def inner_name(self, row: int) -> str:
        """Path of an image in its archive, or in the source."""
        return self.names[row][len(self.prefix.get(self.file[row], "")) :]

    def select_images(self, is_wanted: Callable[[int], str | None]) -> "UnsortedImages":
        """Return some of the images, maybe by shorter names; the others count as left out.

        Args:
            is_wanted: Function of a row that gives the image's name; None = it is left out.
        """
        selection = replace(self, prefix={**self.prefix}, bad_rows=set())
        selection.names, selection.file, selection.offset = [], [], []
        selection.size, selection.label, selection.json = [], [], []
        for row, name in enumerate(self.names):
            short_name = is_wanted(row)
            self.balance.images -= 1
            if short_name is None:
                self.balance.leave_out(name, OUTSIDE)
            else:
                if row in self.bad_rows:
                    selection.bad_rows.add(len(selection.names))
                where = self.file[row], self.offset[row], self.size[row]
                selection.add_image(short_name, *where, self.label[row], self.json[row])
        return selection

    def select_folder(self, folder: str) -> "UnsortedImages":
        """Return the images of archives below one folder, as if it were the root of each archive.

        Args:
            folder: Path of the folder in each archive, or in the source if archives are folders.
        """
        beginning = normalize_name(folder + "/")
        count = len(beginning.split("/")) - 1
        matched: set[int] = set()  # archives that are folders of the path themselves

        def shorten(row: int) -> str | None:
            prefix, inner = self.prefix.get(self.file[row], ""), self.inner_name(row)
            if normalize_name(inner).startswith(beginning):
                return prefix + inner.split("/", count)[-1]
            if prefix and normalize_name(prefix + inner).startswith(beginning):
                matched.add(self.file[row])
                return (prefix + inner).split("/", count)[-1]
            return None

        selection = self.select_images(shorten)
        selection.prefix.update(dict.fromkeys(matched, ""))
        selection.folders = {
            path.split("/", count)[-1]
            for path in self.folders
            if normalize_name(path).startswith(beginning)
        }
        return selection

    def to_listing(
        self,
        files: Sequence[str],
        root: str,
        classes: ClassNames,
        source: str,
        unlabelled: Unlabelled = "refuse",
        empty_classes: Sequence[str] = (),
    ) -> Listing:
        """Number the classes, give each image its key, and sort by name.

        Args:
            files: Paths of the archives by their number.
            root: Folder of the images that are files of their own.
            classes: Class names in the order that numbers them; without readings = sorted.
            source: Name of the source, for messages.
            unlabelled: What to do with images without a label where others have one.
            empty_classes: Class folders without images, which keep their place.

        Raises:
            ValueError: Labels that the class names do not cover, or names for some images only.
        """
        numbers, class_names, notes = self._number_labels(
            classes, source, unlabelled, empty_classes
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
            balance=self.balance,
            notes=notes,
            archives=[identify_file(file) for file in files],
        )

    def _number_labels(
        self,
        classes: ClassNames,
        source: str,
        unlabelled: Unlabelled,
        empty_classes: Sequence[str],
    ) -> NumberedLabels:
        """Number of each image's class and the names; images of bad label files have none."""
        good = [row for row in range(len(self.names)) if row not in self.bad_rows]
        numbered = number_labels(
            [self.label[row] for row in good],
            classes,
            source,
            [self.names[row] for row in good],
            unlabelled=unlabelled,
            empty_classes=empty_classes,
        )
        if not self.bad_rows:
            return numbered
        numbers = [-1] * len(self.names)
        for row, number in zip(good, numbered.numbers, strict=True):
            numbers[row] = int(number)
        return numbered._replace(numbers=numbers)


def identify_file(path: str) -> FileIdentity:
    """Return by what a file is known again; zeros where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a path as text
    except FileNotFoundError:
        return FileIdentity(0, 0)
    return FileIdentity(status.st_size, status.st_mtime_ns)


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its ending."""
    return name.rpartition(".")[2].lower() in SUFFIXES and "." in name


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
