"""What each machine brings: versions, accelerator, limits, the run folder's disk, fast paths."""

import contextlib
import fcntl
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from mocov3_ds import version
from mocov3_ds.checks.finding import Finding, Status, sound
from mocov3_ds.config import Config
from mocov3_ds.data.storage import atomic
from mocov3_ds.data.views import decode, native
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.training.run import encoder_shape

_MIB, _GIB = 2**20, 2**30
_DISK_BYTES = 64 * _MIB
_FILES_NEEDED, _FILES_ADVISED = 512, 4096
_SHM_ADVISED = _GIB


# ----------------------------------------------------------------------------------------- versions


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "timm": _version("timm"),
        "numpy": _version("numpy"),
        "mocov3-ds": f"{version.__version__} ({_source_digest()[:8]})",
    }
    if torch.cuda.is_available():
        found["CUDA"] = f"{torch.version.cuda}"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found["driver"] = _nvidia_smi("driver_version") or "unknown"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source_digest() -> str:
    """Of the program's own files: another checkout on one machine is another program."""
    digest = hashlib.sha256()
    folder = Path(version.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _nvidia_smi(query: str) -> str:
    """Answer for this rank's card; empty where the tool does not answer."""
    card = torch.cuda.current_device()
    uuid = f"GPU-{torch.cuda.get_device_properties(card).uuid}"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def check_versions(of_ranks: Sequence[Mapping[str, str]]) -> Finding:
    """The same versions everywhere; those of rank 0 are shown."""
    names = sorted({name for found in of_ranks for name in found})
    differing = []
    for name in names:
        where: dict[str, list[int]] = {}
        for rank, found in enumerate(of_ranks):
            where.setdefault(found.get(name, "absent"), []).append(rank)
        if len(where) > 1:
            said = "; ".join(f"{v} on rank{_list(r)}" for v, r in where.items())
            differing.append(f"{name} is {said}")
    return sound(
        "versions",
        ", ".join(f"{n} {v}" for n, v in of_ranks[0].items()),
        "equal on all ranks",
        trouble=". ".join(differing),
        remedy="install the same packages (one image or one shared environment) on all machines.",
        numbers={"differing": len(differing)},
    )


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
    return f"{'s' * (len(numbers) > 1)} {shown}"


# ------------------------------------------------------------------------------------ this machine


def check_accelerator(device: torch.device) -> Finding:
    """The card of this rank: memory that is free, capability, memory errors."""
    name = "accelerator"
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return Finding(name, "note", f"no CUDA device: {cores} CPU cores, fp32 and bf16", "")
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    errors = _nvidia_smi("ecc.errors.uncorrected.volatile.total")
    broken = errors.isdecimal() and int(errors) > 0
    busy = free < 0.9 * total
    old = properties.major < 8
    measured = (
        f"{properties.name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, capability "
        f"{properties.major}.{properties.minor}, uncorrected ECC errors: {errors or 'not told'}"
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
    """Open-file limit and shared memory.

    Args:
        files: soft limit of open files; None = ask the system.
        shared: bytes of /dev/shm; None = ask the system.
    """
    if files is None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = sys.maxsize
    if shared is None:
        shm = Path("/dev/shm")
        shared = shutil.disk_usage(shm).total if shm.is_dir() else 0
    cards = torch.cuda.is_available()
    few, small = files < _FILES_ADVISED, shared < _SHM_ADVISED
    return [
        Finding(
            "open-file limit",
            "fail" if files < _FILES_NEEDED else "note" if few else "pass",
            f"{files}" if files < sys.maxsize else "none",
            f">= {_FILES_ADVISED}",
            f"ulimit -n {_FILES_ADVISED} before the launch (LimitNOFILE in systemd, --ulimit in "
            "docker): each rank holds some dozens of files and a socket a peer."
            if few
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
    """Which decoder, colour kernels and optimizer kernels run here, and why not faster ones."""
    triton = find_spec("triton") is not None
    on_cards = device.type == "cuda"
    colour = (
        ("Triton" if triton else "torch") if on_cards else ("native" if native.ready() else "torch")
    )
    optimizer = ("Triton" if triton else "plain torch") if on_cards else "blocks (CPU)"
    found = decode.about()
    return [
        Finding(
            "JPEG decoder",
            "pass" if decode.backend() == "native" else "note",
            found,
            "native",
            ""
            if decode.backend() == "native"
            else "the same pixels, slower: install a C++ compiler and run pip install -e . again.",
        ),
        Finding(
            "kernels",
            "note" if colour == "torch" or optimizer == "plain torch" else "pass",
            f"colour work: {colour}, optimizer: {optimizer}",
            "compiled ones",
            "the same numbers, slower: pip install triton."
            if on_cards and not triton
            else "the same numbers, slower: install a C++ compiler and run pip install -e . again."
            if colour == "torch"
            else "",
        ),
    ]


# ----------------------------------------------------------------------------------- the run folder


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint of this configuration: both encoders and two moments, fp32."""
    with torch.device("meta"):
        base = BaseEncoder(encoder_shape(config))
    tensors = dict(base.named_parameters())
    whole = sum(p.numel() for p in tensors.values())
    trained = sum(p.numel() for p in tensors.values() if p.requires_grad)
    predictor = sum(p.numel() for n, p in tensors.items() if n.startswith("predictor."))
    return 4 * (whole + (whole - predictor) + 2 * trained)


def check_disk_speed(folder: Path) -> Finding:
    """MB/s of a write that is on the disk when it returns."""
    path = folder / f"speed-{ranks.rank()}"
    count = min(_DISK_BYTES, shutil.disk_usage(folder).free // 4)
    block = os.urandom(_MIB)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(count // _MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = count / 1e6 / max(time.perf_counter() - began, 1e-9)
    path.unlink()
    slow = speed < 50
    return Finding(
        "run folder: write",
        "note" if slow else "pass",
        f"{speed:.0f} MB/s to the disk",
        ">= 50 MB/s",
        "checkpoints will take long: put --runs on a faster disk, or save less often "
        "(--save.every_steps)."
        if slow
        else "",
        {"MB/s": speed},
    )


def check_disk_space(folder: Path, config: Config, free: int | None = None) -> Finding:
    """Room for the checkpoints that stay and the one being written.

    Args:
        folder: of runs.
        config: whose checkpoints.
        free: bytes; None = ask the system.
    """
    free = shutil.disk_usage(folder).free if free is None else free
    one = checkpoint_bytes(config)
    needed = one * (config.save.keep + 1)
    enough = free >= needed
    return Finding(
        "run folder: space",
        "pass" if enough else "fail",
        f"{free / 1e9:.1f} GB free",
        f">= {needed / 1e9:.1f} GB ({config.save.keep + 1} checkpoints of {config.recipe})",
        ""
        if enough
        else "free the space, choose another --runs, or keep fewer checkpoints (--save.keep 1).",
        {"free GB": free / 1e9, "needed GB": needed / 1e9},
    )


def check_rename(folder: Path) -> Finding:
    """A folder takes its name whole, and a file replaces another at once."""
    aside, final = folder / f"aside-{ranks.rank()}", folder / f"final-{ranks.rank()}"
    trouble = ""
    try:
        aside.mkdir()
        (aside / "part").write_bytes(b"1" * 4096)
        aside.replace(final)
        atomic.sync(folder)
        old, new = folder / f"old-{ranks.rank()}", folder / f"new-{ranks.rank()}"
        old.write_text("old")
        with old.open() as reader:
            new.write_text("new")
            new.replace(old)
            if old.read_text() != "new" or reader.read() != "old":
                trouble = "a reader sees a mixture of the old and the new file"
        if not trouble and (aside.exists() or (final / "part").stat().st_size != 4096):
            trouble = "the renamed folder is not whole"
    except OSError as error:
        trouble = f"{error}"
    return sound(
        "run folder: rename",
        "at once",
        "at once",
        trouble=trouble,
        remedy="checkpoints are put in place by a rename: use a POSIX file system (local disk, "
        "NFS 4, Lustre, CephFS), not an object store mounted as a folder.",
    )


def check_lock(folder: Path) -> Finding:
    """A second lock of the same file is refused."""
    path = folder / f"lock-{ranks.rank()}"
    trouble = ""
    try:
        with path.open("w") as first, path.open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                trouble = "two holders at once"
    except OSError as error:
        trouble = f"{error}"
    return sound(
        "run folder: lock",
        "one holder",
        "one holder",
        trouble=trouble,
        remedy="two jobs could write one run: mount the file system with locks (NFS: without "
        "nolock; Lustre: -o flock).",
    )


def check_shared(folder: Path) -> Finding:
    """Each rank sees what the first one writes, and the whole of it."""
    path, content = folder / "seen-by-all", os.urandom(4096)
    content = ranks.broadcast_object(content)
    if ranks.is_first():
        path.write_bytes(content)
        atomic.sync(folder)
    ranks.barrier()
    try:
        trouble = "" if path.read_bytes() == content else "another content than rank 0 wrote"
    except OSError as error:
        trouble = f"{type(error).__name__}: {error.strerror}"
    return sound(
        "run folder: shared",
        "seen by each rank",
        "seen by each rank",
        trouble=trouble,
        remedy="each rank reads the checkpoint that rank 0 wrote: put --runs on a file system that "
        "all machines mount.",
    )
