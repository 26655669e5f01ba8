"""How much memory may a process take of its machine, and was there too little before?"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(own_groups: Path = _OWN_GROUPS, groups: Path = _GROUPS) -> int:
    """Return the bytes that the processes of this container or batch job may still take together.

    Args:
        own_groups: File that names the control groups of this process.
        groups: Folder of all control groups of the machine.
    """
    rooms = _rooms_of_groups(own_groups, groups)
    return int(min([psutil.virtual_memory().available, *rooms]))


def _rooms_of_groups(own_groups: Path, groups: Path) -> Iterator[int]:
    """Yield the bytes that each control group around this process still allows."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        innermost = top / path.lstrip("/")
        # a limit binds all groups below; and in a container the path may be the host's, while the
        # files of its own group lie at the top
        for folder in (innermost, *innermost.parents):
            if folder.is_relative_to(top):
                yield from _room_of_group(folder, *names)


def _room_of_group(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """Yield the room in one control group; nothing where it sets no limit."""
    try:
        room = int((folder / limit).read_text()) - int((folder / used).read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return
    # files read a while ago count as used, but make way before anything fails
    yield max(room + int(counters.get(cached, 0)), 0)


def count_oom_kills() -> int:
    """Return how often this machine's kernel has killed a process for lack of memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
