"""How does a file get on this machine's disk so that a kill or a power cut never leaves half of it?

A state file is replaced by `replace_when_whole`; a log grows by an `Appender`.
"""

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
"""End of the names of files that are being written; a killed process may leave some behind."""

_BLOCK = 1 << 20
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("mocov3_ds")


class Appender:
    """A log file that outlasts a full disk: what cannot be written is kept and written later.

    A log is no reason to end a run; whether it can go on is for its checkpoints to say.

    Args:
        path: Log file, which is continued if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._warned = False

    def append(self, data: bytes) -> None:
        """Write `data`, and before it what could not be written earlier."""
        self._pending += data
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                reason = error.strerror
                _log.warning("%s cannot be written now (%s); it is kept", self._path, reason)
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        """Write what is still pending, if that is possible, and close the file."""
        self.append(b"")
        if self._pending:
            _log.warning("%s lacks its last %d bytes", self._path, len(self._pending))
        self._file.close()


@contextlib.contextmanager
def replace_when_whole(path: Path, *, unique: bool = False, durable: bool = True) -> Iterator[Path]:
    """Give a file new content: at any moment it has the old one or the new one, never a part.

    The content is written to a temporary file beside `path`, synced to the disk, and renamed; then
    the folder is synced, so that a power cut after the block finds the new content.

    Args:
        path: The file to replace, which need not exist.
        unique: Give the temporary file a name that no other process uses, for a file that several
            processes or machines may write at the same time.
        durable: Sync file and folder. Without it, a power cut may leave a damaged file, which
            whoever reads it must notice; a kill leaves none.

    Yields:
        The temporary file's path, to be written in whatever way.

    Raises:
        OSError: The file cannot be written; the old content stays and the temporary file goes.
    """
    # machines that share a file system may have the same process ids
    identity = f".{os.getpid()}-{os.urandom(4).hex()}" if unique else ""
    temporary = path.with_name(f"{path.name}{identity}{TEMPORARY_SUFFIX}")
    is_written = False
    try:
        yield temporary
        is_written = True
        if durable:
            sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException as error:
        # A full disk names no file. Any other error of the block may be of something that it read.
        if isinstance(error, OSError) and (is_written or error.errno in _DISK_IS_FULL):
            error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    if durable:
        sync_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Give a file new text, whole or not at all; see `replace_when_whole`.

    Raises:
        OSError: The file cannot be written; the old content stays.
    """
    with replace_when_whole(path) as temporary:
        temporary.write_text(text)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Raises:
        OSError: The disk refused it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """Compute the SHA-256 of a file, as hexadecimal text.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
