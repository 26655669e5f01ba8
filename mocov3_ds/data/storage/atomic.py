"""Files that are whole and on disk when a function returns."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20
_log = logging.getLogger("mocov3_ds")


class Appender:
    """A log file that outlasts a full disk: what cannot be written is kept and written later.

    A log is no reason to end a run; whether it can go on is for its checkpoints to say.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._kept = b""
        self._warned = False

    def append(self, data: bytes) -> None:
        """Write, and before it what could not be written earlier."""
        self._kept += data
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]
        except OSError as error:
            if not self._warned:
                reason = error.strerror
                _log.warning("%s cannot be written now (%s); it is kept", self._path, reason)
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        """Write what is left, if that can be, and finish the file."""
        self.append(b"")
        if self._kept:
            _log.warning("%s lacks its last %d bytes", self._path, len(self._kept))
        self._file.close()


@contextlib.contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Give a file new content: at any moment it has the old one or the new one, never a part.

    The content is written to a temporary file beside `path`, synced to the disk, and renamed; then
    the folder is synced, so that a power cut after the block finds the new content.

    Args:
        path: the file, which may exist already.

    Yields:
        The temporary file's path, to be written in whatever way.

    Raises:
        OSError: the file cannot be written; the old content stays and the temporary file goes.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk names no file
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Give a file new text, whole or not at all; see `replace_when_whole`.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    with replace_when_whole(path) as temporary:
        temporary.write_text(text)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Raises:
        OSError: the disk refused it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
