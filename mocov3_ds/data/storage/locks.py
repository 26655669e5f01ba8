"""Does another process of any machine work on a file or folder? The kernel's locks say so.

A lock ends with the process that holds it, even by a kill -9, so no stale one is ever left behind.
Some file systems (Lustre without -o flock, some NFS) have none; then there is a warning, and the
work goes on.
"""

import errno
import fcntl
import logging
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger("mocov3_ds")


def take_lock(descriptor: int, path: Path, *, shared: bool = False) -> bool:
    """Try to lock an open file or folder for this process; False = another one holds it.

    Args:
        descriptor: The open file or folder; the lock lasts until it is closed.
        path: Its path, for the warning where the file system has no locks.
        shared: Let others hold it as well, if they share it too: for a look at who holds it.

    Raises:
        OSError: The lock failed for another reason.
    """
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        reason = error.strerror
        _log.warning("%s: no locks here (%s); start no second process on it", path, reason)
    return True
