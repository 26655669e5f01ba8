"""Which images does a folder hold? Every file below it, without reading any.

Linked folders are followed as torchvision's `ImageFolder` follows them: a class that is a link to
another has that one's images, too. A folder that holds itself by a link is left out.
"""

import os
from pathlib import Path

from data_prep import balance
from data_prep.listing import UnsortedImages, is_image_name
from data_prep.member_names import is_hidden, quote_name

_MOST_REPEATS = 10_000
"""Folders that may be met again by links; a few links in each other's folders make millions."""


def list_tree(images: UnsortedImages, root: Path) -> None:
    """Add the images of a folder.

    Args:
        images: List to which the images are added.
        root: Path of the folder.

    Raises:
        ValueError: A link leads to nothing, or links lead to the same folders over and over.
    """
    met: set[tuple[int, int]] = set()
    repeats = 0
    # a folder below the root with a slash at its end, and the folders that it lies in
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, ancestors = waiting.pop()
        status = os.stat(f"{root}/{folder}")  # noqa: PTH116 - Path costs as much as the call
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            images.balance.see()
            images.balance.leave_out(folder.rstrip("/"), balance.LOOP)
            continue
        if identity in met:
            repeats += 1
            images.repeated_folders.append(folder.rstrip("/"))
        if repeats > _MOST_REPEATS:
            raise ValueError(
                f"links in {root} lead to folders that were met before more than {_MOST_REPEATS} "
                f"times, e.g. {quote_name(folder)}; remove some of them."
            )
        met.add(identity)
        images.folders.add(folder.rstrip("/"))
        inner = ancestors | {identity}
        with os.scandir(f"{root}/{folder}") as entries:
            waiting += [(name, inner) for name in _sort_entries(images, root, folder, entries)]


def _sort_entries(
    images: UnsortedImages, root: Path, folder: str, entries: "os._ScandirIterator[str]"
) -> list[str]:
    """Add the images right inside a folder; returns the folders in it, each with a slash."""
    folders = []
    for entry in entries:
        name = folder + entry.name
        if is_hidden(entry.name):
            images.balance.see()
            images.balance.leave_out(name, balance.HIDDEN)
        elif entry.is_dir():
            folders.append(f"{name}/")
        elif not is_image_name(entry.name):
            images.balance.see()
            images.leave_out(name, name)
        elif not entry.is_file():
            raise ValueError(
                f"{quote_name(str(root / name))} is a link to nothing; remove or repair it."
            )
        else:
            images.balance.see()
            images.add_image(name, -1, 0, entry.stat().st_size, None)
    return folders
