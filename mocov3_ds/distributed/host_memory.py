"""Memory that a process may take of its machine, within the container or batch job around it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes that the processes of this container may still take together."""
    return int(min([psutil.virtual_memory().available, *_group_rooms()]))


def _group_rooms() -> Iterator[int]:
    """Bytes that each control group around this process (a container, a batch job) still allows."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = _GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / path.lstrip("/")
        # a limit binds all groups below; and in a container the path may be the host's, while the
        # files of its own group lie at the top
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield from _group_room(folder, *names)


def _group_room(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """Room in one control group; nothing where it sets no limit."""
    try:
        room = int((folder / limit).read_text()) - int((folder / used).read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return
    # files read a while ago count as used, but make way before anything fails
    yield max(room + int(counters.get(cached, 0)), 0)
