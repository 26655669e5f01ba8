"""Is this GPU right, and how fast is it? The command `mocov3 gpu`; `flags` has its help.

First come the checks, then everything is timed and the planner is held against it. What may take
longer than is left is left out. The file is written after each part, so that a process that is
killed leaves what was found.
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mocov3_ds.bench.gpu import speeds
from mocov3_ds.bench.gpu.flags import GpuOptions, read_flags
from mocov3_ds.bench.gpu.speeds import Speeds
from mocov3_ds.checks import (
    attention,
    equivalence,
    machine,
    momentum_kernel,
    network,
    optimizer_kernels,
    restart,
    step_variants,
    view_kernels,
)
from mocov3_ds.checks.check_run import Check, format_table, run_checks, show_progress
from mocov3_ds.checks.finding import Finding
from mocov3_ds.data.storage.atomic import write_text
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.model.shapes import PAPER_SHAPES
from mocov3_ds.optim.kernels import choose_kernels
from mocov3_ds.planning.measured_card import REPORT_SCHEMA
from mocov3_ds.recipes import without_launcher_flags
from mocov3_ds.settings.environment import check_environment
from mocov3_ds.settings.paths import expand_home
from mocov3_ds.version import __version__

_TIMEOUT_S = 600.0
_LARGE_BYTES = 5 * 2**33  # four flats of 2^31 numbers, and what is made beside them
VOID_WORDS = "void: the device computes nothing, no value or time below means anything"


def list_correct_checks(device: torch.device, folder: Path, recipes: Sequence[str]) -> list[Check]:
    """What must be right; the times are those of a slow GPU, with Triton's compiler.

    Args:
        device: the device of this rank.
        folder: empty folder that all ranks see.
        recipes: networks of the paper.
    """
    kernels = choose_kernels("auto", device)
    checks = [
        Check(
            "machine",
            lambda: [
                machine.check_versions(ranks.gather_objects(machine.read_versions())),
                machine.check_accelerator(device),
                *machine.check_limits(),
                *machine.check_fast_paths(device),
            ],
            10,
        ),
        Check("optimizer kernels", lambda: optimizer_kernels.check_kernels(kernels, device), 55),
        Check("momentum encoder", lambda: [momentum_kernel.check_momentum(device)], 10),
        Check("views", lambda: [view_kernels.check_views(device)], 25),
        Check("training step", lambda: equivalence.check_steps(device), 30),
        Check("chunks", lambda: [step_variants.check_chunks(device)], 15),
        Check("repetition", lambda: [equivalence.check_determinism(device)], 10),
        Check("resume", lambda: restart.check_restart(device, folder), 40),
        Check("large flat", lambda: _check_large_flat(device), 20),
    ]
    if ranks.world_size() > 1:
        checks.insert(1, Check("collectives", lambda: network.check_collectives(device), 60))
    # the backend that may end the process comes last
    safe = [name for name in attention.BACKENDS if name != "cuDNN"]
    for backends in (safe, ["cuDNN"]):
        checks += [
            Check(
                f"attention, {recipe}" + ", cuDNN" * (len(backends) == 1),
                partial(_check_attention, device, recipe, backends),
                8,
            )
            for recipe in recipes
        ]
    checks.append(Check("compiled blocks", partial(_check_compiled, device), 45))
    return checks


def _check_compiled(device: torch.device) -> list[Finding]:
    if problem := devices.triton_problem(device):
        return [Finding("compiled = as written", "skip", f"Triton does not run here: {problem}")]
    return [step_variants.check_compiled(device)]


def _check_attention(device: torch.device, recipe: str, backends: Sequence[str]) -> list[Finding]:
    name = f"attention, {recipe}, cuDNN"
    if backends == ["cuDNN"] and not torch.backends.cudnn.enabled:
        return [Finding(name, "skip", "cuDNN is switched off")]
    return attention.check_attention(device, recipe, backends)


def _check_large_flat(device: torch.device) -> list[Finding]:
    name = "more numbers than an int32 counts"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if free < _LARGE_BYTES:
        text = f"needs {_LARGE_BYTES / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return [Finding(name, "skip", text)]
    try:
        kernels = choose_kernels("auto", device)
        return optimizer_kernels.check_large_flat(kernels, device)
    finally:
        speeds.free_memory()


def list_speed_checks(
    device: torch.device, folder: Path, recipes: Sequence[str], measured: Speeds
) -> list[Check]:
    """What is timed, in the order of its worth; compiling, which takes longest, comes last.

    Args:
        device: the device of this rank.
        folder: empty folder that all ranks see.
        recipes: networks of the paper.
        measured: gets what later parts reckon with.
    """
    seconds = {"vit_s16": 15, "vit_b16": 20, "vit_l16": 45, "vit_h14": 90}
    middle = recipes[len(recipes) // 2]
    saved = "vit_b16" if "vit_b16" in recipes else recipes[0]

    def time_steps(recipe: str, compiled: bool) -> Check:
        title = f"step, {recipe}" + ", compiled" * compiled
        work = partial(speeds.measure_steps, recipe, device, measured, compiled=compiled)
        return Check(title, work, seconds[recipe] + 45 * compiled)

    checks = [Check("rates", partial(speeds.measure_rates, device, measured), 10)]
    checks += [time_steps(recipe, False) for recipe in recipes]
    return [
        *checks,
        Check("planner", partial(speeds.compare_planner, measured), 0),
        Check("views on the device", partial(speeds.measure_views, device), 5),
        Check("optimizers", partial(speeds.measure_optimizers, device, middle), 20),
        Check("momentum", partial(speeds.measure_momentum, device, middle), 8),
        Check("loader", partial(speeds.measure_loader, device, folder), 25),
        Check("checkpoint", partial(speeds.measure_checkpoint, device, folder, saved), 30),
        *(time_steps(recipe, True) for recipe in recipes),
    ]


def examine_gpu(options: GpuOptions) -> bool:
    """Run all checks, print the table, write the file; all ranks must call.

    Args:
        options: what the user gave on the command line.

    Returns:
        Whether nothing failed.

    Raises:
        ValueError: there is no GPU, a recipe is none of the paper's, or the minutes are none.
    """
    if unknown := [name for name in options.recipes if name not in PAPER_SHAPES]:
        choices = ", ".join(PAPER_SHAPES)
        raise ValueError(f"--recipes {unknown[0]}: the paper's networks are {choices}.")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes} must be above 0.")
    device = ranks.start(timeout_s=_TIMEOUT_S)
    if device.type != "cuda":
        raise ValueError(
            "mocov3 gpu needs a CUDA device, and torch finds none it can use here; mocov3 doctor "
            "examines a machine without one."
        )
    torch.backends.cudnn.allow_tf32 = False  # comparisons are made in full fp32
    hosts: list[str] = ranks.gather_objects(socket.gethostname())
    begin, measured = time.monotonic(), Speeds()
    show_progress(f"{ranks.world_size()} x {torch.cuda.get_device_name(device)}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mocov3-gpu-") as name:
        folder = Path(ranks.broadcast_object(name))
        checks = list_correct_checks(device, folder, options.recipes)
        checks += list_speed_checks(device, folder, options.recipes, measured)
        findings = run_checks(
            checks,
            hosts,
            limit_s=60 * options.minutes,
            is_void=options.void,
            tell=lambda so_far: write_report(options, hosts, so_far, measured),
        )
        ranks.barrier()
    write_report(options, hosts, findings, measured)
    if ranks.is_first():
        if options.void:
            print(VOID_WORDS)
        print(format_table(findings))
        print(f"{time.monotonic() - begin:.0f} s")
    ranks.barrier()  # a launcher ends all ranks when the first one leaves with an error
    return all(finding.status != "fail" for finding in findings)


def write_report(
    options: GpuOptions, hosts: Sequence[str], findings: Sequence[Finding], measured: Speeds
) -> None:
    """Write what was found so far, on the first rank.

    Args:
        options: what the user gave on the command line.
        hosts: the machine of each rank, in rank order.
        findings: what all ranks found until now.
        measured: rates and reach for the planner.
    """
    if options.json is None or not ranks.is_first():
        return
    tree: dict[str, Any] = {
        "program": "mocov3 gpu",
        "schema": REPORT_SCHEMA,
        "version": __version__,
        "void": options.void,
        "good": all(finding.status != "fail" for finding in findings),
        "device": torch.cuda.get_device_name(),
        "hosts": list(hosts),
        "rates": measured.rates,
        "reach": measured.reach,
        "findings": [finding.as_json() for finding in findings],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.json, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def main() -> int:
    """Exit status: 0 = nothing failed, 1 = something did (on rank 0), 2 = no GPU, bad flags."""
    try:
        check_environment()
        options = read_flags(expand_home(without_launcher_flags(sys.argv[1:])))
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        good = examine_gpu(options)
    except (ValueError, OSError) as error:
        if ranks.is_first():
            print(f"mocov3 gpu: error: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0 if good or not ranks.is_first() else 1
