"""Which device a process may use: cards that torch cannot use, hidden cards, capabilities."""

import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mocov3_ds.distributed import devices, ranks

OLD, NONE, GOOD = 12040, 0, 13000


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch find no card: with this driver, built for this CUDA or ROCm."""

    def pretend(driver: int, cuda: str | None = "13.0", hip: str | None = None) -> None:
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(devices, "_driver_cuda_version", lambda: driver)

    return pretend


def machine(folder: Path, **files: str) -> Path:
    """A root folder with some files of /dev, /proc and /sys, __ for a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


NVIDIA = {
    "dev__nvidia0": "",
    "proc__driver__nvidia__version": "NVRM version: NVIDIA UNIX x86_64 Module  535.104.05  Sat",
}
AMD = {
    "sys__class__kfd__kfd__topology__nodes__0__gpu_id": "0\n",
    "sys__class__kfd__kfd__topology__nodes__1__gpu_id": "51123\n",
}
INTEL = {
    "sys__class__drm__renderD128__device__vendor": "0x8086\n",
    "sys__class__drm__renderD128__device__class": "0x038000\n",
}


@pytest.mark.parametrize(
    ("files", "driver", "cuda", "hip", "said"),
    [
        (NVIDIA, OLD, "13.0", None, r"driver 535\.104\.05 speaks CUDA 12\.4.*driver 580 or newer"),
        ({}, OLD, "13.0", None, "NVIDIA driver speaks CUDA 12.4"),
        (NVIDIA, OLD, "12.6", None, "driver 535.104.05.*finds no device.*nvidia-smi"),
        (NVIDIA, NONE, "13.0", None, "libcuda.so.1 is not.*--gpus all"),
        (NVIDIA, GOOD, "13.0", None, "finds no device.*CUDA_VISIBLE_DEVICES"),
        (NVIDIA, NONE, None, None, "built without CUDA: install the stock torch"),
        (AMD, NONE, "13.0", None, "AMD GPU.*ROCm build"),
        (AMD, NONE, None, "6.4", "built for ROCm, but finds no AMD GPU"),
        (INTEL, NONE, "13.0", None, r"Intel GPU \(XPU\)"),
    ],
)
def test_a_card_that_torch_cannot_use_is_named_with_its_remedy(
    tmp_path: Path,
    no_card: Callable[..., None],
    files: dict[str, str],
    driver: int,
    cuda: str | None,
    hip: str | None,
    said: str,
) -> None:
    no_card(driver, cuda, hip)
    sentence = devices.describe_unusable_card(machine(tmp_path, **files))
    assert re.search(said, sentence) and sentence.endswith("uses the CPU all the same.")


def test_a_machine_without_cards_is_no_fault(tmp_path: Path, no_card: Callable[..., None]) -> None:
    no_card(NONE)
    graphics = {  # of a laptop: an AMD processor, and Intel graphics that only draw
        "sys__class__kfd__kfd__topology__nodes__0__gpu_id": "0\n",
        "sys__class__drm__renderD128__device__vendor": "0x8086\n",
        "sys__class__drm__renderD128__device__class": "0x030000\n",
    }
    assert devices.describe_unusable_card(tmp_path / "empty") == ""
    assert devices.describe_unusable_card(machine(tmp_path, **graphics)) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_who_means_the_cpu_is_not_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_card: Callable[..., None],
    name: str,
    value: str,
) -> None:
    no_card(OLD)
    monkeypatch.setenv(name, value)
    assert devices.describe_unusable_card(machine(tmp_path, **NVIDIA)) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.this_device() == torch.device("cpu")


def test_no_rank_starts_beside_an_unusable_card(
    monkeypatch: pytest.MonkeyPatch, no_card: Callable[..., None]
) -> None:
    no_card(OLD)
    with pytest.raises(ValueError, match="too old for this torch"):
        ranks.start()


def test_code_runs_on_the_same_major_version_and_ptx_on_all_later_ones() -> None:
    stock = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    assert devices.runs_on((8, 9), stock) and devices.runs_on((12, 1), stock)
    assert not devices.runs_on((7, 0), stock) and not devices.runs_on((11, 0), stock)
    assert devices.runs_on((11, 0), [*stock, "compute_90"])
    assert not devices.runs_on((7, 0), [*stock, "compute_90"])
    assert devices.runs_on((9, 0), ["sm_90a"]) and devices.runs_on((7, 0), [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_allocator_grows_in_place_unless_the_user_has_said_something(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "_has_nvml", lambda: False)
    devices.choose_allocator()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == given.get("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(devices, "_has_nvml", lambda: True)
    devices.choose_allocator()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


def test_tf32_is_refused_where_there_is_none() -> None:
    devices.set_tf32(False, torch.device("cpu"))
    with pytest.raises(ValueError, match="--tf32 has no effect on this device"):
        devices.set_tf32(True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler."), "python3-dev.*Failed to find C compiler"),
        (subprocess.CalledProcessError(1, ["gcc"]), "python3-dev.*CalledProcessError"),
        (ImportError("triton"), "not installed"),
    ],
)
def test_triton_that_cannot_be_used_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    probe = types.ModuleType("mocov3_ds.distributed.triton_probe")

    def launch_probe(device: torch.device) -> None:
        raise error

    probe.launch_probe = launch_probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mocov3_ds.distributed.triton_probe", probe)
    devices.triton_problem.cache_clear()
    with caplog.at_level(logging.WARNING, "mocov3_ds"):
        for _ in range(2):
            assert re.search(said, devices.triton_problem(torch.device("cuda")))
    devices.triton_problem.cache_clear()
    assert len(caplog.records) == 1 and "slower kernels" in caplog.text
