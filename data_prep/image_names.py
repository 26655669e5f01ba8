"""Which image of a source does somebody else's list mean? The one that shares the longest path."""

import unicodedata
from collections.abc import Sequence

from data_prep.images import SUFFIXES


class ImageNames:
    """Finds images by their path, by its end, with or without their ending.

    Args:
        names: Paths of the images in the source.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [_plain_path(name) for name in names]
        self._whole = [_Paths(self._names), _Paths([_without_ending(name) for name in self._names])]

    def find_images(self, name: str) -> list[int]:
        """Numbers of the images that a name may mean: [] = none, two = it says too little.

        `/data/train/cat/1.jpg` means `cat/1.jpg` of the source, and `1.jpg` does, too, unless
        another folder has one. The ending counts where an image has it, and not where none has.

        Args:
            name: Path in a list.
        """
        plain = _plain_path(name)
        return self._whole[0].find_rows(plain) or self._whole[1].find_rows(_without_ending(plain))


class _Paths:
    """Paths, and the ends of all of them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._whole: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        for row, path in enumerate(paths):
            _note_row(self._whole, path, row)
            end = path
            while end:
                _note_row(self._ends, end, row)
                end = end.partition("/")[2]

    def find_rows(self, path: str) -> list[int]:
        """Rows of the paths that end as this one does, or that this one ends as; at most two."""
        if rows := self._whole.get(path) or self._ends.get(path):
            return rows
        while path and path not in self._whole:
            path = path.partition("/")[2]
        return self._whole.get(path, [])


def _note_row(rows: dict[str, list[int]], path: str, row: int) -> None:
    """Note a row for a path; two show that the path says too little."""
    numbers = rows.setdefault(path, [row])
    if len(numbers) < 2 and numbers[0] != row:
        numbers.append(row)


def _plain_path(name: str) -> str:
    path = unicodedata.normalize("NFC", name).replace("\\", "/")
    return path.removeprefix("./").strip("/")


def _without_ending(path: str) -> str:
    """The path of an image without its ending; other dots are part of the name."""
    stem, _, suffix = path.rpartition(".")
    return stem if stem and suffix.lower() in SUFFIXES else path
