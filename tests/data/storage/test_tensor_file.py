"""A file of tensors has the mode that umask says."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mocov3_ds.data.storage.tensor_file import save_tensors


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_umask_decides_the_mode(tmp_path: Path, mask: int) -> None:
    path, previous = tmp_path / "a.safetensors", os.umask(mask)
    try:
        save_tensors({"w": torch.arange(3)}, path, {"heads": "4"})
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        path.chmod(0o640)
        save_tensors({"w": torch.ones(3)}, path)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(previous)
    with safe_open(str(path), framework="pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.ones(3))


def test_a_disk_that_fails_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        save_tensors({"w": torch.ones(1)}, tmp_path / "gone/a.safetensors")
