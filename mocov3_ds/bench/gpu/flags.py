"""`mocov3 gpu`: its flags, which are read before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mocov3_ds.settings import command_line


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Is this GPU right, and how fast is it? Ten minutes, one table, one file.

    mocov3 gpu --json gpu.json (one GPU, the first that is visible)
    torchrun --nproc-per-node 8 -m mocov3_ds.cli gpu --json gpu.json (all of a machine)
    mocov3 plan --gpus 8xH200 --rates gpu.json (plan with what was measured)

    First come the checks: each kernel against its formulas, attention by each backend, the step
    against one on the CPU, chunks, a resumed run. A wrong value is named and makes the status 1.
    Then everything is timed, and the planner is held against it.
    """

    minutes: float = 10.0
    """time for all of it; what may take longer than is left is left out, and said"""
    json: Path | None = None
    """file for all that was found and measured, written after each part"""
    recipes: tuple[str, ...] = ("vit_s16", "vit_b16", "vit_l16", "vit_h14")
    """networks whose attention is checked and whose steps are timed"""
    folder: Path | None = None
    """folder for a run, images and a checkpoint, on the disk that counts; empty = the system's"""
    void: bool = False
    """the device computes nothing (a stand-in for tests): wrong values are noted, not failures"""


def read_flags(arguments: Sequence[str]) -> GpuOptions:
    """The flags of a command line.

    Args:
        arguments: what follows `mocov3 gpu`.

    Raises:
        SystemExit: tyro has printed help, or what is wrong.
    """
    return command_line.read_flags(GpuOptions, "mocov3 gpu", arguments)
