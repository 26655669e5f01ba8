"""Can torch use the accelerator of this machine, and for what?

A card that torch cannot use must not turn a run of hours into one of weeks on the CPU without a
word; one that has no bf16, or no kernels in this torch, is told before anything is built on it.
"""

import ctypes
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from mocov3_ds.settings.environment import read_word

_DRIVERS = {"13": 580, "12": 525, "11": 450}
"""first NVIDIA driver for each major version of CUDA (CUDA release notes, minor compatibility)"""
_INSIST = "--device cpu (or DS_ACCELERATOR=cpu) uses the CPU all the same"
_OLD_WHEELS = "a torch built for an older CUDA (pytorch.org, previous versions)"
_OWN_CONTEXT_BYTES = 2**30
_AMPERE = (8, 0)
"""compute capability from which tensor cores have bf16 and TF32"""
_ADA = (8, 9)
"""compute capability from which they have fp8, also with a scale for each row"""
_HIDDEN = ("", "-1", "NoDevFiles")
"""values of CUDA_VISIBLE_DEVICES with which a user hides all cards"""

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

_log = logging.getLogger("mocov3_ds")


def is_cpu_meant() -> bool:
    """Tell whether the user has asked for the CPU, or hides all cards."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN
    return hidden or read_word("DS_ACCELERATOR") == "cpu"


def has_usable_card() -> bool:
    """Tell whether this process computes on a card."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
        return not is_cpu_meant() and torch.cuda.is_available()


def insist_on_cpu() -> None:
    """Use the CPU in this process from now on, also in DeepSpeed, whatever cards there are."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # for what has not been imported yet
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


def choose_allocator() -> None:
    """Let CUDA's allocator grow its segments in place, which keeps chunks from fragmenting it.

    It must be called before CUDA starts. What the user has set stays. Nothing is changed without
    NVML, as in a container whose driver capabilities leave out `utility`: torch 2.14 asks it for
    each such segment, and crashes where it is missing.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES) and _has_nvml():
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _has_nvml() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def describe_unusable_card(root: Path = Path("/")) -> str:
    """Why torch cannot use an accelerator that this machine has, and what to do.

    Empty where it can, where there is none, and where the user means the CPU.

    Args:
        root: Where `dev`, `proc` and `sys` are.
    """
    if is_cpu_meant() or has_usable_card():
        return ""
    reason = _nvidia_reason(root) or _amd_reason(root) or _intel_reason(root)
    return f"{reason}; {_INSIST}." if reason else ""


def _nvidia_reason(root: Path) -> str:
    files = sorted((root / "dev").glob("nvidia[0-9]*"))
    built_for, speaks = torch.version.cuda, _driver_cuda_version()
    if built_for is None:
        return (
            f"an NVIDIA card is here ({files[0]}), but this torch ({torch.__version__}) is built "
            "without CUDA: install the stock torch"
            if files
            else ""
        )
    if speaks and speaks // 1000 < int(built_for.split(".")[0]):
        needed = _DRIVERS.get(built_for.split(".")[0])
        return (
            f"the NVIDIA driver{_driver_release(root)} speaks CUDA {speaks // 1000}."
            f"{speaks % 1000 // 10}, which is too old for this torch: it is built for CUDA "
            f"{built_for} and needs driver {needed} or newer; update it, or install {_OLD_WHEELS}"
        )
    if not files:
        return ""
    if not speaks:
        return (
            f"an NVIDIA card is here ({files[0]}), but its driver's library libcuda.so.1 is not: "
            f"start the container with --gpus all, or install driver "
            f"{_DRIVERS.get(built_for.split('.')[0])} or newer"
        )
    return (
        f"an NVIDIA card is here ({files[0]}, driver{_driver_release(root)}), but CUDA finds no "
        "device: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    )


def _driver_cuda_version() -> int:
    """CUDA version of the driver, 12040 for 12.4; 0 where there is none."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _driver_release(root: Path) -> str:
    """Release of the driver with a space before it; empty where it is not told."""
    try:
        entries = (root / "proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((f" {entry}" for entry in entries if entry[:1].isdigit() and "." in entry), "")


def _amd_reason(root: Path) -> str:
    if torch.version.hip is not None:
        return "this torch is built for ROCm, but finds no AMD GPU: look at rocm-smi"
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    if not any(_read_line(node) not in ("", "0") for node in nodes):
        return ""
    return (
        "an AMD GPU is here (/dev/kfd), but this torch is not built for ROCm: install torch's ROCm "
        "build (pytorch.org), with which this program has not been tried"
    )


def _intel_reason(root: Path) -> str:
    devices = (root / "sys/class/drm").glob("renderD*/device")
    is_accelerator = any(
        _read_line(device / "vendor") == "0x8086" and _read_line(device / "class") == "0x038000"
        for device in devices
    )
    if not is_accelerator and not torch.xpu.is_available():
        return ""
    return "an Intel GPU (XPU) is here, which this program does not use: it knows CUDA and the CPU"


def _read_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------ what a card can compute


def check_kernels(device: torch.device) -> None:
    """Refuse a card for which this torch has no kernels.

    Args:
        device: The CUDA device that they would run on.

    Raises:
        ValueError: names card, capability and the torch to install.
    """
    capability = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if not runs_on(capability, built):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {_spell(capability)}, "
            f"and this torch {torch.__version__} has kernels for {', '.join(built)} alone; install "
            f"{_OLD_WHEELS}, or use --device cpu."
        )


def runs_on(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Tell whether a card can run code that was built for some architectures.

    Args:
        capability: Compute capability of the card, major and minor.
        built: Architectures as `torch.cuda.get_arch_list` gives them: machine code (sm_80) runs on
            the same major and no smaller minor version, PTX (compute_80) on everything later.
    """
    for architecture in built:
        kind, _, digits = architecture.partition("_")
        if not digits.isdigit():  # sm_90a and the like are of one card alone
            digits = digits[:-1]
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and capability >= version:
            return True
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return True
    return not built


def set_tf32(wanted: bool, device: torch.device) -> None:
    """Choose whether products and convolutions in fp32 may round their inputs to TF32.

    Args:
        wanted: Whether fp32 products may be computed in TF32.
        device: Device that the network is to compute on; nothing is changed for a CPU.

    Raises:
        ValueError: It is wanted where there is none.
    """
    has_it = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE
    if wanted and not has_it:
        raise ValueError(f"--tf32 has no effect on this device ({device}), which has no TF32.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted else "highest")
        torch.backends.cudnn.allow_tf32 = wanted


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 itself; torch emulates it slowly on older cards.

    Args:
        device: Device that the network is to compute on.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= _AMPERE


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a card that only emulates it.

    Args:
        device: Device that the network is to compute on.

    Raises:
        ValueError: names card and capability, and the config to use.
    """
    if not has_bf16(device):
        capability = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} (compute capability {_spell(capability)}) has "
            "no bf16, which torch would emulate slowly; use --deepspeed_config "
            "ds_configs/zero1_adamw_fp16.json, or --ds bf16.enabled=false for fp32."
        )


def check_fp8(device: torch.device) -> None:
    """Refuse fp8 on a card whose products, or torch's, cannot have a scale for each row.

    Args:
        device: Device that the network is to compute on; a CPU computes it slowly.

    Raises:
        ValueError: Names card and capability, and what to do.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < _ADA:
        raise ValueError(
            f"--model.fp8 needs an NVIDIA card of compute capability {_spell(_ADA)} or more (L4, "
            f"L40S, H100, B200), and {torch.cuda.get_device_name(device)} has compute capability "
            f"{_spell(capability)}; leave the flag out."
        )


def bytes_of_others() -> int:
    """Memory of this process's card that other programs hold, as far as it is more than a trifle.

    Kernels and the context of this process take memory of the card that torch knows nothing of, up
    to 1 GiB: that much is not told from a trifle.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    free, total = torch.cuda.mem_get_info()
    foreign_bytes = total - free - torch.cuda.memory_reserved()
    return foreign_bytes if foreign_bytes > _OWN_CONTEXT_BYTES else 0


def _spell(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


# ---------------------------------------------------------------------------------------- Triton


@cache
def triton_problem(device: torch.device) -> str:
    """Why Triton cannot build and start kernels here; empty where it can.

    Found out once, by starting a kernel of one element; where it fails, that is logged as a
    warning, and slower kernels with the same numbers are used.

    Args:
        device: The CUDA device that they would run on.
    """
    try:
        from mocov3_ds.distributed.triton_probe import launch_probe

        launch_probe(device)
    except ImportError:
        problem = "it is not installed: pip install triton"
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        problem = (
            f"it cannot build its launcher: install gcc and Python's headers (python3-dev) "
            f"({type(error).__name__}: {reason[:200]})"
        )
    else:
        return ""
    _log.warning("slower kernels with the same numbers, as Triton cannot be used: %s", problem)
    return problem
