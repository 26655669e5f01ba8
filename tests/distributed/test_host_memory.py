"""Free memory is that of the tightest container around a process."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mocov3_ds.distributed import host_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", {}, 20),  # no files: no bound
        ("0::/", {"": ("max", 9, 3)}, 20),
        ("0::/", {"": (10, 9, 3)}, 4),  # the cache of files read a while ago makes way
        ("0::/", {"": (10, 12, 0)}, 0),
        ("0::/job/step", {"job/step": (10, 4, 0), "job": (8, 5, 1), "": ("max", 9, 0)}, 4),
        ("0::/docker/1a2b", {"": (10, 4, 0)}, 6),  # the host's path, the container's files
        ("3:cpu:/\n2:memory:/job\n0::/", {"memory/job": (10, 9, 3)}, 4),
        ("3:cpu,memory:/job", {"memory/job": (2**33, 9, 3), "memory": (10, 8, 0)}, 2),
    ],
)
def test_free_memory_in_a_container(
    groups: str,
    files: dict[str, tuple[int | str, int, int]],
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own").write_text(groups + "\n")
    for folder, (limit, used, cached) in files.items():
        old = folder.startswith("memory")
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        (tmp_path / "fs" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            content = str(value * GIB) if isinstance(value, int) else value
            (tmp_path / "fs" / folder / f"memory.{name}").write_text(content + "\n")
        counter = f"{'total_' * old}inactive_file {cached * GIB}"
        (tmp_path / "fs" / folder / "memory.stat").write_text(f"anon 5\n{counter}\n")
    memory = SimpleNamespace(available=20 * GIB)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: memory)
    assert host_memory.free_bytes(tmp_path / "own", tmp_path / "fs") == free * GIB


def test_kills_for_lack_of_memory_are_counted() -> None:
    assert host_memory.count_oom_kills() >= 0
