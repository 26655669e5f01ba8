"""How is a compressed tar read in any order? By way of its plain form in a scratch folder."""

import bz2
import gzip
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPENERS: dict[str, Callable[[Path], Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
}
"""Function that opens a compressed tar, by the last ending of its name."""


def is_compressed_tar(path: Path) -> bool:
    """Whether a name is that of a compressed tar."""
    suffix = path.suffix.removeprefix(".")
    return suffix == "tgz" or (suffix in OPENERS and path.stem.endswith(".tar"))


def decompress_tar(path: Path, folder: Path) -> Path:
    """Write a compressed tar's plain form to the scratch folder and return its path.

    Raises:
        ValueError: The tar is damaged or cut short.
    """
    plain = folder / path.name.removesuffix(path.suffix).removesuffix(".tar")
    plain = plain.with_name(f"{plain.name}.tar")
    print(f"unpacking {path.name} to {plain} for reading in any order", file=sys.stderr)
    try:
        with OPENERS[path.suffix.removeprefix(".")](path) as source, plain.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} cannot be unpacked to {folder}: {error}.") from None
    return plain
