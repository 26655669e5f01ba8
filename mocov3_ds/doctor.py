"""Examine your own machines before a long run: are its numbers right here, and how fast is it?

    deepspeed mocov3_ds/doctor.py                      this machine (plain python: one rank)
    deepspeed --hostfile hosts mocov3_ds/doctor.py --runs /shared/runs --recipe vit_l16 \
        --shards s3://bucket/imagenet --store s3://bucket/scratch

Start it the way the run will be started (torchrun, accelerate launch and srun work as well), on all
its machines. N ranks must compute what one computes; a run must be saved and continued; network,
disk and storage must work and are timed. A check that fails does not stop the others.
"""

import json
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# run as a file by a launcher: the repository root, not this folder, on the path
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from mocov3_ds.checks import equivalence, machine, network, restart, run_disk, storage_access
from mocov3_ds.checks.check_run import Check, format_table, run_checks, show_progress
from mocov3_ds.data.storage import StorageError
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.recipes import find_recipe, without_launcher_flags
from mocov3_ds.settings.environment import check_environment
from mocov3_ds.settings.paths import expand_home

_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Examine machines, network, disk and storage before a long run."""

    runs: Path = Path("runs")
    """folder of all runs, on a disk that all ranks see"""
    recipe: str = "vit_b16"
    """recipe whose checkpoints the disk must hold"""
    shards: str = ""
    """folder or URL of sharded images to read; empty = skip"""
    store: str = ""
    """folder or URL that may be written, e.g. s3://bucket/scratch; empty = skip"""
    json: Path | None = None
    """file for the findings as JSON"""


def list_checks(
    options: DoctorOptions,
    device: torch.device,
    folder: Path,
    sizes_mb: Sequence[int] = network.SIZES_MB,
    unusable_card: str = "",
) -> list[Check]:
    """What is examined, in order: title and check. All ranks run each.

    Args:
        options: what the user gave on the command line.
        device: the device of this rank.
        folder: empty folder below `options.runs` that all ranks see; it is deleted afterwards.
        sizes_mb: buffer sizes of the collectives, 10^6 bytes.
        unusable_card: why torch cannot use the card of this machine; empty = it can.
    """
    config = find_recipe(options.recipe).config
    return [
        Check(
            "versions",
            lambda: [machine.check_versions(ranks.gather_objects(machine.read_versions()))],
        ),
        Check(
            "machine",
            lambda: [
                machine.check_accelerator(device, unusable=unusable_card),
                *machine.check_limits(),
                *machine.check_fast_paths(device),
                network.check_clock(),
            ],
        ),
        Check("collectives", lambda: network.check_collectives(device, sizes_mb)),
        Check(
            "gather and batch norm",
            lambda: [equivalence.check_gather(device), equivalence.check_batch_norm(device)],
        ),
        Check("training step", lambda: equivalence.check_steps(device)),
        Check("repetition", lambda: [equivalence.check_determinism(device)]),
        Check(
            "run folder",
            lambda: [
                run_disk.check_shared(folder),
                run_disk.check_disk_speed(folder),
                run_disk.check_disk_space(folder, config),
                run_disk.check_rename(folder),
                run_disk.check_lock(folder),
            ],
        ),
        Check("checkpoint", lambda: restart.check_restart(device, folder)),
        Check("object store", lambda: storage_access.check_store(options.store)),
        Check("shards", lambda: storage_access.check_shards(options.shards)),
    ]


def examine_machines(options: DoctorOptions, sizes_mb: Sequence[int] = network.SIZES_MB) -> bool:
    """Run all checks, print the table, and return whether nothing failed; all ranks must call.

    Args:
        options: what the user gave on the command line.
        sizes_mb: buffer sizes of the collectives, 10^6 bytes.

    Raises:
        ValueError: the recipe is unknown, or the folder of runs cannot be written.
    """
    find_recipe(options.recipe)
    unusable_card = devices.describe_unusable_card()
    device = ranks.start(timeout_s=_TIMEOUT_S, device_choice="cpu" if unusable_card else "auto")
    torch.backends.cudnn.allow_tf32 = False  # comparisons are made in full fp32
    hosts: list[str] = ranks.gather_objects(socket.gethostname())
    start = time.monotonic()
    show_progress(f"{ranks.world_size()} ranks on {len({*hosts})} machines, {device.type}")
    folder = Path(ranks.run_on_first(partial(_make_folder, options.runs)))
    try:
        findings = run_checks(list_checks(options, device, folder, sizes_mb, unusable_card), hosts)
    finally:
        ranks.barrier()
        if ranks.is_first():
            shutil.rmtree(folder, ignore_errors=True)
    good = all(f.status != "fail" for f in findings)
    if ranks.is_first():
        print(format_table(findings))
        print(f"{time.monotonic() - start:.0f} s")
        if options.json is not None:
            tree = {"good": good, "hosts": hosts, "findings": [f.as_json() for f in findings]}
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


def main() -> int:
    """Exit status: 0 = nothing failed, 1 = something did (on rank 0 only), 2 = bad options."""
    try:
        check_environment()
        arguments = expand_home(without_launcher_flags(sys.argv[1:]))
        options = tyro.cli(DoctorOptions, args=arguments, prog="doctor.py", description=__doc__)
        good = examine_machines(options)
    except (ValueError, StorageError) as error:
        if ranks.is_first():
            print(f"doctor.py: error: {error}", file=sys.stderr)
        return 2
    return 0 if good or not ranks.is_first() else 1


if __name__ == "__main__":
    sys.exit(main())
