"""Examine your own machines before a long run: are its numbers right here, and how fast is it?

    deepspeed mocov3_ds/doctor.py                      this machine (plain python: one rank)
    deepspeed --hostfile hosts mocov3_ds/doctor.py --runs /shared/runs --recipe vit_l16 \
        --shards s3://bucket/imagenet --store s3://bucket/scratch

Start it as the run will be started (torchrun, accelerate launch and srun as well), on all its
machines. N ranks must compute what one computes; a checkpoint must be saved, found and continued;
network, disk and storage must work and are timed. A check that fails does not stop the others.
"""

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# run as a file by a launcher: the repository root, not this folder, on the path
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from mocov3_ds.checks import exact, machine, network, resume, stores
from mocov3_ds.checks.finding import Finding, merged
from mocov3_ds.config import RECIPES, without_launcher_flags
from mocov3_ds.distributed import ranks

_TIMEOUT_S = 120.0
_MARKS = {"pass": "pass", "note": "note", "skip": "skip", "fail": "FAIL"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Examine machines, network, disk and storage before a long run."""

    runs: Path = Path("runs")
    """folder of all runs, on a disk that all ranks see"""
    recipe: str = "vit_b16"
    """whose checkpoints the disk must hold"""
    shards: str = ""
    """folder or URL of sharded images to read; empty = skip"""
    store: str = ""
    """folder or URL that may be written, e.g. s3://bucket/scratch; empty = skip"""
    json: Path | None = None
    """file that gets the findings as JSON"""


Check = tuple[str, Callable[[], list[Finding]]]


def checks(options: Options, device: torch.device, folder: Path) -> list[Check]:
    """What is examined, in order: title and check. All ranks run each.

    Args:
        options: from the command line.
        device: of this rank.
        folder: empty, below `options.runs`, seen by all ranks, gone afterwards.
    """
    config = RECIPES[options.recipe].config
    return [
        ("versions", lambda: [machine.check_versions(ranks.gather_objects(machine.versions()))]),
        (
            "machine",
            lambda: [
                machine.check_accelerator(device),
                *machine.check_limits(),
                *machine.check_fast_paths(device),
                network.check_clock(),
            ],
        ),
        ("collectives", lambda: network.check_collectives(device)),
        (
            "gather and batch norm",
            lambda: [exact.check_gather(device), exact.check_batch_norm(device)],
        ),
        ("training step", lambda: exact.check_steps(device)),
        ("repetition", lambda: [exact.check_determinism(device)]),
        (
            "run folder",
            lambda: [
                machine.check_shared(folder),
                machine.check_disk_speed(folder),
                machine.check_disk_space(folder, config),
                machine.check_rename(folder),
                machine.check_lock(folder),
            ],
        ),
        ("checkpoint", lambda: resume.check_resume(device, folder)),
        ("object store", lambda: stores.check_store(options.store)),
        ("shards", lambda: stores.check_shards(options.shards)),
    ]


def examine(todo: Sequence[Check], hosts: Sequence[str]) -> list[Finding]:
    """Run all checks on all ranks and merge what the ranks found."""
    findings: list[Finding] = []
    for number, (title, check) in enumerate(todo, 1):
        began = time.monotonic()
        _say(f"[{number}/{len(todo)}] {title} ...")
        own = _guarded(title, check)
        try:
            findings += merged(ranks.gather_objects(own), hosts)
        except Exception as error:  # a rank is gone or still in a check that the others have left
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            remedy = "no later check was run: mend what failed before, and run the doctor again."
            lost = Finding(f"{title}: ranks", "fail", words, "all ranks answer", remedy)
            return [*findings, *own, lost]
        _say(f"[{number}/{len(todo)}] {title}: {time.monotonic() - began:.1f} s")
    return findings


def _guarded(title: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check found, or that it could not be carried out."""
    try:
        return check()
    except (Exception, SystemExit) as error:  # the other checks still have something to say
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return [
            Finding(title, "fail", words[:300], "the check runs", "see the error of this rank.")
        ]


def table(findings: Sequence[Finding]) -> str:
    """The findings for people, and under them what to do."""
    rows = [(f.name, _MARKS[f.status], f.measured, f.wanted) for f in findings]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    wide[2] = min(wide[2], 76)
    lines = [
        f"{name:<{wide[0]}}  {mark:<4}  {measured:<{wide[2]}}  {wanted}".rstrip()
        for name, mark, measured, wanted in rows
    ]
    todo = [f for f in findings if f.remedy]
    lines += [""] * bool(todo)
    lines += [f"{_MARKS[f.status]} {f.name}: {f.remedy}" for f in todo]
    failed = sum(f.status == "fail" for f in findings)
    counts = f"{len(findings)} checks, {failed} failed"
    return "\n".join([*lines, "", counts])


def doctor(options: Options) -> bool:
    """Examine, print, and say whether nothing failed; all ranks must call.

    Raises:
        ValueError: an unknown recipe, a folder of runs that cannot be written.
    """
    if options.recipe not in RECIPES:
        raise ValueError(f"no recipe {options.recipe!r}; there are {', '.join(RECIPES)}.")
    device = ranks.start(timeout_s=_TIMEOUT_S)
    torch.backends.cudnn.allow_tf32 = False  # comparisons are made in full fp32
    hosts: list[str] = ranks.gather_objects(socket.gethostname())
    began = time.monotonic()
    _say(f"{ranks.world_size()} ranks on {len({*hosts})} machines, {device.type}")
    folder = Path(ranks.first_does(partial(_make_folder, options.runs)))
    try:
        findings = examine(checks(options, device, folder), hosts)
    finally:
        ranks.barrier()
        if ranks.is_first():
            shutil.rmtree(folder, ignore_errors=True)
    good = all(f.status != "fail" for f in findings)
    if ranks.is_first():
        print(table(findings))  # noqa: T201
        print(f"{time.monotonic() - began:.0f} s")  # noqa: T201
        if options.json is not None:
            tree = {"good": good, "hosts": hosts, "findings": [asdict(f) for f in findings]}
            options.json.write_text(json.dumps(tree, indent=1) + "\n")
    ranks.barrier()  # a launcher ends all ranks when the first one leaves with an error
    return good


def _make_folder(runs: Path) -> str:
    folder = runs / f".doctor-{time.time_ns():x}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{runs} cannot be written: {error.strerror}; give --runs.") from None
    return str(folder.resolve())


def _say(text: str) -> None:
    if ranks.is_first():
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Status 0 = nothing failed, 1 = something did (rank 0 alone says so), 2 = bad options."""
    try:
        arguments = without_launcher_flags(sys.argv[1:])
        good = doctor(tyro.cli(Options, args=arguments, prog="doctor.py", description=__doc__))
    except ValueError as error:
        if ranks.is_first():
            print(f"doctor.py: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0 if good or not ranks.is_first() else 1


if __name__ == "__main__":
    sys.exit(main())
