"""How does a file get on this machine's disk so that a kill or a power cut never leaves half of it?

A state file is replaced by `replace_when_whole`; a log grows by an `Appender`. Neither follows a
link or takes a name that somebody can foresee: a folder may come from a stranger.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
"""End of the names of files that are being written; a killed process may leave some behind."""
ABANDONED_S = 3600.0
"""Age of a half-written file whose writer must be gone."""

_TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)
_BLOCK = 1 << 20
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("mocov3_ds")


class Appender:
    """A log file that outlasts a full disk: what cannot be written is kept and written later.

    A log is no reason to end a run; whether it can go on is for its checkpoints to say.

    Args:
        path: Log file, which is continued if it exists.

    Raises:
        OSError: The file cannot be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_own(path, os.O_WRONLY | os.O_APPEND)
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


def open_own(path: Path, flags: int) -> io.FileIO:
    """Open a file of this program's own, made where it does not exist; a link is not followed.

    Args:
        path: The file, below folders that exist.
        flags: How it is opened, as `os.open` takes it, e.g. `os.O_WRONLY | os.O_APPEND`.

    Raises:
        OSError: The file cannot be opened, is a link, or is no plain file.
    """
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link; remove it", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EEXIST, "it is no plain file; remove it", str(path))
    mode = "rb+" if flags & os.O_RDWR else "ab" if flags & os.O_APPEND else "wb"
    return io.FileIO(descriptor, mode)


def open_new(path: Path) -> BinaryIO:
    """Make a file that does not exist yet, with the rights that the user's umask leaves.

    Raises:
        FileExistsError: There is something of that name, be it a link that leads nowhere.
        OSError: The file cannot be made.
    """
    return path.open("xb")


def is_temporary(name: str) -> bool:
    """Whether `replace_when_whole` gave a file this name, as it gives none that it is told."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_abandoned(folder: Path, age_s: float = ABANDONED_S) -> None:
    """Remove files that killed processes were writing into a folder.

    Args:
        folder: The folder, which need not exist.
        age_s: Seconds since the last write after which its writer must be gone.
    """
    with contextlib.suppress(FileNotFoundError):
        for item in os.scandir(folder):
            if is_temporary(item.name):
                with contextlib.suppress(OSError):
                    status = item.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime >= age_s:
                        Path(item.path).unlink()


@contextlib.contextmanager
def replace_when_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a file new content: at any moment it has the old one or the new one, never a part.

    The content is written to a temporary file beside `path`, synced to the disk, and renamed; then
    the folder is synced, so that a power cut after the block finds the new content. The temporary
    file is new and has a name that no other process uses, and `path` itself is not followed where
    it is a link.

    Args:
        path: The file to replace, which need not exist.
        durable: Sync file and folder. Without it, a power cut may leave a damaged file, which
            whoever reads it must notice; a kill leaves none.

    Yields:
        Path of the temporary file, which exists and is empty, to be written in whatever way.

    Raises:
        OSError: The file cannot be written; the old content stays and the temporary file goes.
    """
    # machines that share a file system may have the same process ids
    identity = f"{os.getpid()}-{os.urandom(4).hex()}"
    temporary = path.with_name(f"{path.name}.{identity}{TEMPORARY_SUFFIX}")
    is_written = False
    try:
        open_new(temporary).close()
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
