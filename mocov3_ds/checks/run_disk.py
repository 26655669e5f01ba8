"""Can the disk of the run folder hold checkpoints, and does it do what they rely on?"""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

import torch

from mocov3_ds.checks.finding import Finding, judge_problem
from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder

_MIB = 2**20


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint in bytes: both encoders and two optimizer states a weight, fp32."""
    with torch.device("meta"):
        base = BaseEncoder(encoder_shape(config))
    tensors = dict(base.named_parameters())
    total = sum(p.numel() for p in tensors.values())
    trained = sum(p.numel() for p in tensors.values() if p.requires_grad)
    predictor = sum(p.numel() for n, p in tensors.items() if n.startswith("predictor."))
    return 4 * (total + (total - predictor) + 2 * trained)


def check_disk_speed(folder: Path, size: int = 64 * _MIB) -> Finding:
    """How fast is a write that is on the disk when it returns?

    Args:
        folder: folder on the disk of the run folder.
        size: number of bytes to write; less if the disk is nearly full.
    """
    path = folder / f"speed-{ranks.rank()}"
    count = min(size, shutil.disk_usage(folder).free // 4)
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
    """Is there room for the checkpoints that stay and the one being written?

    Args:
        folder: folder of the runs.
        config: the run whose checkpoints are to fit.
        free: free bytes of the disk; None = ask the system.
    """
    free = shutil.disk_usage(folder).free if free is None else free
    needed = checkpoint_bytes(config) * (config.save.keep + 1)
    fits = free >= needed
    return Finding(
        "run folder: space",
        "pass" if fits else "fail",
        f"{free / 1e9:.1f} GB free",
        f">= {needed / 1e9:.1f} GB ({config.save.keep + 1} checkpoints of {config.recipe})",
        ""
        if fits
        else "free the space, choose another --runs, or keep fewer checkpoints (--save.keep 1).",
        {"free GB": free / 1e9, "needed GB": needed / 1e9},
    )


def check_rename(folder: Path) -> Finding:
    """Does a renamed folder appear complete, and does a file replace another at once?"""
    source, target = folder / f"source-{ranks.rank()}", folder / f"target-{ranks.rank()}"
    problem = ""
    try:
        source.mkdir()
        (source / "content").write_bytes(b"1" * 4096)
        source.replace(target)
        atomic.sync_to_disk(folder)
        old, new = folder / f"old-{ranks.rank()}", folder / f"new-{ranks.rank()}"
        old.write_text("old")
        with old.open() as reader:
            new.write_text("new")
            new.replace(old)
            if old.read_text() != "new" or reader.read() != "old":
                problem = "a reader sees a mixture of the old and the new file"
        if not problem and (source.exists() or (target / "content").stat().st_size != 4096):
            problem = "the renamed folder is not complete"
    except OSError as error:
        problem = f"{error}"
    return judge_problem(
        "run folder: rename",
        "at once",
        "at once",
        problem=problem,
        remedy="checkpoints are put in place by a rename: use a POSIX file system (local disk, "
        "NFS 4, Lustre, CephFS), not an object store mounted as a folder.",
    )


def check_lock(folder: Path) -> Finding:
    """Is a second lock of the same file refused?"""
    path = folder / f"lock-{ranks.rank()}"
    problem = ""
    try:
        with path.open("w") as first, path.open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                problem = "two holders at once"
    except OSError as error:
        problem = f"{error}"
    return judge_problem(
        "run folder: lock",
        "one holder",
        "one holder",
        problem=problem,
        remedy="two processes could write one run: mount the file system with locks (NFS: without "
        "nolock; Lustre: -o flock).",
    )


def check_shared(folder: Path) -> Finding:
    """Does each rank see all of what the first one writes?"""
    path, content = folder / "shared", os.urandom(4096)
    content = ranks.broadcast_object(content)
    if ranks.is_first():
        path.write_bytes(content)
        atomic.sync_to_disk(folder)
    ranks.barrier()
    try:
        problem = "" if path.read_bytes() == content else "another content than rank 0 wrote"
    except OSError as error:
        problem = f"{type(error).__name__}: {error.strerror}"
    return judge_problem(
        "run folder: shared",
        "seen by each rank",
        "seen by each rank",
        problem=problem,
        remedy="each rank reads the checkpoint that rank 0 wrote: put --runs on a file system that "
        "all machines mount.",
    )
