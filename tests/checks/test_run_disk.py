"""The run folder's disk: full, slow, without locks, with renames that copy, or not shared."""

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.checks import run_disk
from mocov3_ds.checks.finding import Finding
from mocov3_ds.distributed import ranks
from mocov3_ds.recipes import RECIPES
from tests.checks.breaking import failing_names
from tests.ranks_pool import run_ranks


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RECIPES["vit_l16"].config
    # 302 M in the backbone, 23 M in the heads; the published ViT-L checkpoint is of this order
    assert 4.5e9 < run_disk.checkpoint_bytes(config) < 5.5e9
    assert run_disk.check_disk_space(tmp_path, config, free=10**12).status == "pass"
    full = run_disk.check_disk_space(tmp_path, config, free=10**10)
    assert full.status == "fail"
    assert "10.0 GB free" in full.measured
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.1))
    slow = run_disk.check_disk_speed(tmp_path, size=1 << 20)
    assert slow.status == "note"
    assert slow.numbers["MB/s"] < 20
    assert list(tmp_path.iterdir()) == []


def test_rename_that_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_disk.check_rename(tmp_path).status == "pass"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()

    def copied(self: Path, target: Path) -> Path:
        if self.is_dir():
            return Path(shutil.copytree(self, target))
        return Path(shutil.copyfile(self, target))  # into the same file, before readers' eyes

    monkeypatch.setattr(Path, "replace", copied)
    finding = run_disk.check_rename(tmp_path)
    assert finding.status == "fail"
    assert "POSIX" in finding.remedy


@pytest.mark.parametrize("refuses", [False, True])
def test_locks_that_do_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    assert run_disk.check_lock(tmp_path).status == "pass"

    def flock(file: Any, kind: int) -> None:
        if refuses:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    finding = run_disk.check_lock(tmp_path)
    assert finding.status == "fail"
    assert ("not implemented" if refuses else "two holders") in finding.measured


def look_at_own_folder(folder: str) -> list[Finding]:
    path = Path(folder) / f"rank-{ranks.rank()}"
    path.mkdir()
    return [run_disk.check_shared(path)]


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    first, second = run_ranks(2, look_at_own_folder, str(tmp_path))
    assert not failing_names(first)
    assert failing_names(second) == {"run folder: shared"}
