"""How is a compressed tar read in any order? By way of its plain form in a scratch folder.

The scratch folder is marked and locked while it is used: a later run removes those that a killed
one has left, and nothing else.
"""

import bz2
import contextlib
import fcntl
import gzip
import importlib
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.member_names import quote_name

_PREFIX = "data_prep-"
_MARK = "made-by-data_prep"
_BLOCK = 1 << 20


def open_zstd(path: Path) -> Any:
    """Open a file compressed by zstd for reading.

    Raises:
        ValueError: Neither this Python nor a package can read it.
    """
    try:
        return importlib.import_module("compression.zstd").open(path)  # Python 3.14 and later
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{quote_name(str(path))} needs zstandard to be read: pip install zstandard."
        ) from None
    # frames may follow each other, as parallel compressors write them
    return zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)


OPENERS: dict[str, Callable[[Path], Any]] = {
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zst": open_zstd,
}
"""Function that opens a compressed file, by its ending."""

_SHORT_ENDINGS = {
    **dict.fromkeys(("tgz", "taz"), "gz"),
    **dict.fromkeys(("tbz", "tbz2", "tb2"), "bz2"),
    "txz": "xz",
    **dict.fromkeys(("tzst", "tzstd"), "zst"),
}
_LONG_ENDINGS = {**{ending: ending for ending in OPENERS}, "zstd": "zst"}
TAR_ENDINGS = (".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz")
"""Endings of tars, for messages."""

_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}


def is_compressed_tar(path: Path) -> bool:
    """Whether a name is that of a compressed tar."""
    return bool(named_compression(path))


def named_compression(path: Path) -> str:
    """Key of `OPENERS` for a compressed tar by its name; empty = it is none."""
    suffix = path.suffix.removeprefix(".").lower()
    if suffix in _SHORT_ENDINGS:
        return _SHORT_ENDINGS[suffix]
    return _LONG_ENDINGS.get(suffix, "") if path.stem.lower().endswith(".tar") else ""


def archive_stem(path: Path) -> str:
    """Name of an archive without its endings."""
    return path.stem[: -len(".tar")] if path.stem.lower().endswith(".tar") else path.stem


def find_compression(path: Path) -> str:
    """Key of `OPENERS` for a tar by its name, or by its first bytes; empty = it is plain.

    Raises:
        OSError: The file cannot be read.
    """
    named = named_compression(path)
    if named:
        return named
    with path.open("rb") as file:
        head = file.read(6)
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


class CompressedTar:
    """A compressed tar as a stream of its plain bytes, which goes forward only.

    Args:
        path: Path of the tar.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._file = _open_compressed(path)

    def read(self, size: int, /) -> bytes:
        """Read the next plain bytes, fewer than `size` only at the end.

        Raises:
            ValueError: The file is damaged or cut short.
        """
        pieces = []
        while size > 0 and (piece := _read_plain(self._file, self._path, size)):
            pieces.append(piece)
            size -= len(piece)
            self._position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def seek(self, position: int, /) -> None:
        """Go forward to a byte; stops at the end."""
        while self._position < position:
            if not self.read(min(_BLOCK, position - self._position)):
                return

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_compressed(path: Path) -> Any:
    return OPENERS[find_compression(path)](path)


def _read_plain(file: Any, path: Path, size: int) -> bytes:
    """Some of the next bytes that a compressed file holds."""
    try:
        return bytes(file.read(size))
    except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        reason = f"{error}".rstrip(".") or type(error).__name__
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "error"):  # each library has its own
            raise
        reason = f"{error}".rstrip(".")
    raise ValueError(f"{quote_name(str(path))} is damaged or cut short: {reason}.")


def decompress_tar(path: Path, folder: Path) -> Path:
    """Write a compressed tar's plain form to a folder of its own and return its path.

    Args:
        path: Path of the compressed tar.
        folder: Folder for the plain form, which holds no other file.

    Raises:
        ValueError: The tar is damaged or cut short.
        OSError: The plain form cannot be written.
    """
    plain = folder / f"{archive_stem(path)}.tar"
    print(
        f"unpacking {quote_name(path.name)} to {quote_name(str(plain))} for reading in any order",
        file=sys.stderr,
    )
    with contextlib.closing(_open_compressed(path)) as source, plain.open("xb") as out:
        while block := _read_plain(source, path, _BLOCK):
            out.write(block)
    return plain


@contextlib.contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """Make a scratch folder that goes when the block ends, or with the next run after a kill.

    Args:
        parent: Folder to make it in; None = the system's temporary folder.

    Raises:
        OSError: It cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        folder = Path(name)
        with (folder / _MARK).open("x") as mark:
            with contextlib.suppress(OSError):  # a file system without locks: nobody cleans up
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mark.write("this folder is removed when the run ends\n")
                mark.flush()
            yield folder


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders that killed runs of this user have left in a folder.

    Args:
        parent: Folder in which scratch folders are made.
    """
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _MARK, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if not os.fstat(descriptor).st_size:
                    continue  # a file system without locks, or a run that has just begun
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                print(f"removed {folder}, which a killed run has left", file=sys.stderr)
            finally:
                os.close(descriptor)
