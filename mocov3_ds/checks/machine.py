"""What does each machine bring: versions, accelerator, limits of the system, compiled code?"""

import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from mocov3_ds import version
from mocov3_ds.checks.finding import Finding, Status, judge_problem
from mocov3_ds.data.views import decode, native
from mocov3_ds.distributed import devices, ranks

_GIB = 2**30
_FILES_NEEDED, _FILES_ADVISED = 512, 4096
_SHM_ADVISED = _GIB


# ----------------------------------------------------------------------------------------- versions


def read_versions() -> dict[str, str]:
    """Version of each program that must be the same on all ranks."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _package_version("deepspeed"),
        "timm": _package_version("timm"),
        "numpy": _package_version("numpy"),
        "mocov3-ds": f"{version.__version__} ({_source_digest()[:8]})",
    }
    if devices.has_usable_card():
        versions["CUDA"] = f"{torch.version.cuda}"
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        versions["driver"] = _nvidia_smi("driver_version") or "unknown"
    return versions


def _package_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source_digest() -> str:
    """sha256 of the files of this package, so that another checkout counts as another version."""
    digest = hashlib.sha256()
    folder = Path(version.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _nvidia_smi(query: str) -> str:
    """What nvidia-smi answers about the card of this rank; empty if it does not answer."""
    card = torch.cuda.current_device()
    uuid = f"GPU-{torch.cuda.get_device_properties(card).uuid}"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={uuid}"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.strip()


def check_versions(by_rank: Sequence[Mapping[str, str]]) -> Finding:
    """Are the versions equal on all ranks? Those of rank 0 are shown.

    Args:
        by_rank: what `read_versions` returned on each rank, in rank order.
    """
    names = sorted({name for versions in by_rank for name in versions})
    differing = []
    for name in names:
        ranks_with: dict[str, list[int]] = {}
        for rank, versions in enumerate(by_rank):
            ranks_with.setdefault(versions.get(name, "absent"), []).append(rank)
        if len(ranks_with) > 1:
            listed = "; ".join(f"{v} on {_name_ranks(r)}" for v, r in ranks_with.items())
            differing.append(f"{name} is {listed}")
    return judge_problem(
        "versions",
        ", ".join(f"{name} {version}" for name, version in by_rank[0].items()),
        "equal on all ranks",
        problem=". ".join(differing),
        remedy="install the same packages (one image or one shared environment) on all machines.",
        numbers={"differing": len(differing)},
    )


def _name_ranks(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
    return f"rank{'s' * (len(numbers) > 1)} {listed}"


# ------------------------------------------------------------------------------------ this machine


def check_accelerator(
    device: torch.device, ecc_errors: str | None = None, unusable: str = ""
) -> Finding:
    """Free memory, capability and memory errors of the card of this rank.

    Args:
        device: the device of this rank.
        ecc_errors: number of uncorrected ECC errors as nvidia-smi writes it; None = ask it.
        unusable: why torch cannot use the machine's card, see `devices.describe_unusable_card`;
            empty = it can, or there is none.
    """
    name = "accelerator"
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        measured = f"no CUDA device: {cores} CPU cores, fp32 and bf16"
        return Finding(name, "fail" if unusable else "note", measured, "", unusable)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    if ecc_errors is None:
        ecc_errors = _nvidia_smi("ecc.errors.uncorrected.volatile.total")
    broken = ecc_errors.isdecimal() and int(ecc_errors) > 0
    busy = free < 0.9 * total
    old = not devices.has_bf16(device)
    measured = (
        f"{properties.name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, capability "
        f"{properties.major}.{properties.minor}, uncorrected ECC errors: {ecc_errors or 'unknown'}"
    )
    remedy = (
        "the card's memory is failing: take it out of service (nvidia-smi -q -d ECC)."
        if broken
        else "another process holds memory of this card: see nvidia-smi."
        if busy
        else "no bf16 before capability 8.0: use an fp16 config of ds_configs/."
        if old
        else ""
    )
    status: Status = "fail" if broken else "note" if busy or old else "pass"
    return Finding(
        name,
        status,
        measured,
        "90 % free, no errors",
        remedy,
        {"free GiB": free / _GIB, "total GiB": total / _GIB},
    )


def check_limits(files: int | None = None, shared: int | None = None) -> list[Finding]:
    """Are the open-file limit and the shared memory large enough?

    Args:
        files: soft limit of open files; None = ask the system.
        shared: size of /dev/shm in bytes; None = ask the system.
    """
    if files is None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = sys.maxsize
    if shared is None:
        shm = Path("/dev/shm")
        shared = shutil.disk_usage(shm).total if shm.is_dir() else 0
    cards = devices.has_usable_card()
    low_limit, small = files < _FILES_ADVISED, shared < _SHM_ADVISED
    return [
        Finding(
            "open-file limit",
            "fail" if files < _FILES_NEEDED else "note" if low_limit else "pass",
            f"{files}" if files < sys.maxsize else "none",
            f">= {_FILES_ADVISED}",
            f"ulimit -n {_FILES_ADVISED} before the launch (LimitNOFILE in systemd, --ulimit in "
            "docker): each rank holds some dozens of files and a socket a peer."
            if low_limit
            else "",
            {"files": files},
        ),
        Finding(
            "shared memory",
            "pass" if not small else "fail" if cards and ranks.local_world_size() > 1 else "note",
            f"/dev/shm of {shared / _GIB:.2f} GiB",
            f">= {_SHM_ADVISED / _GIB:g} GiB",
            "NCCL exchanges through it inside a machine: docker run --shm-size=8g, or --ipc=host."
            if small
            else "",
            {"GiB": shared / _GIB},
        ),
    ]


def check_fast_paths(device: torch.device) -> list[Finding]:
    """Which decoder, colour kernels and optimizer kernels run here, and why no faster ones?"""
    on_cards = device.type == "cuda"
    problem = devices.triton_problem(device) if on_cards else ""
    triton = not problem
    colour = (
        ("Triton" if triton else "torch")
        if on_cards
        else ("native" if native.is_built() else "torch")
    )
    optimizer = ("Triton" if triton else "plain torch") if on_cards else "blocks (CPU)"
    return [
        Finding(
            "JPEG decoder",
            "pass" if decode.current_decoder() == "native" else "note",
            decode.describe_decoder(),
            "native",
            ""
            if decode.current_decoder() == "native"
            else "the same pixels, slower: install a C++ compiler and run pip install -e . again.",
        ),
        Finding(
            "kernels",
            "note" if colour == "torch" or optimizer == "plain torch" else "pass",
            f"colour work: {colour}, optimizer: {optimizer}",
            "compiled ones",
            f"the same numbers, slower: Triton cannot be used, {problem}."
            if problem
            else "the same numbers, slower: install a C++ compiler and run pip install -e . again."
            if colour == "torch"
            else "",
        ),
    ]
