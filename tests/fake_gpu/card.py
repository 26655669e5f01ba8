"""A card of the fake GPU, and the library that stands in for the CUDA libraries."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

_SOURCES = Path(__file__).parent
_PACKAGES = Path(sysconfig.get_path("purelib"))
_HEADERS = _PACKAGES / "triton/backends/nvidia/include"


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """What the process is to believe of its card."""

    memory_gb: float = 79.1
    """memory of the card, GiB"""
    held_gb: float = 0.0
    """what another process holds of it, GiB"""
    capability: tuple[int, int] = (9, 0)
    name: str = "NVIDIA H100 80GB HBM3"
    count: int = 1
    """cards that the process sees"""
    driver: int = 13000
    """CUDA version of the driver, 12040 for 12.4; 0 = there is none"""

    def environment(self, library: Path) -> dict[str, str]:
        """Environment variables of a process that sees this card.

        Args:
            library: What `build_library` returned.
        """
        major, minor = self.capability
        return {
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": str(library.parent),
            "FAKE_GPU_MEMORY_GB": str(self.memory_gb),
            "FAKE_GPU_HELD_GB": str(self.held_gb),
            "FAKE_GPU_CAPABILITY": str(10 * major + minor),
            "FAKE_GPU_NAME": self.name,
            "FAKE_GPU_COUNT": str(self.count),
            "FAKE_GPU_DRIVER": str(self.driver),
        }


H100 = FakeGpu()


@cache
def build_library() -> Path:
    """Compile the stand-ins once for this process and return the library.

    A test is skipped where they cannot be built or torch has no CUDA inside.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    cuda = torch.version.cuda or ""
    reason = (
        f"this torch is built for CUDA {cuda or 'of no version'}, the fake GPU speaks 13"
        if not cuda.startswith("13.")
        else "there is no C++ compiler"
        if compiler is None
        else "the headers of CUDA are not installed (they come with triton)"
        if not (_HEADERS / "driver_types.h").is_file()
        else ""
    )
    if reason:
        pytest.skip(f"no fake GPU: {reason}")
    folder = tempfile.TemporaryDirectory(prefix="fake-gpu-")
    _FOLDERS.append(folder)  # lives as long as the process
    library = Path(folder.name) / "libcuda.so.1"
    command = [f"{compiler}", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += [f"-I{_HEADERS}", *map(str, sorted(_SOURCES.glob("*.cpp"))), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True, timeout=300)
    (library.parent / "libnvidia-ml.so.1").symlink_to(library.name)
    return library


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def fake_environment(gpu: FakeGpu, changes: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a process on a fake card.

    Args:
        gpu: What it is to believe.
        changes: Variables that differ from this process; an empty one is unset.
    """
    # what tests set for the CPU, and what a launcher of this process may have set
    ours = {"DS_ACCELERATOR": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **ours, **gpu.environment(build_library()), **changes}
    return {name: value for name, value in environment.items() if value}
