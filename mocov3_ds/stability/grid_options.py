"""Which flags does `mocov3 stability run` have? Read before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Scale = Literal["tiny", "cifar", "imagenet"]


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Flags of `mocov3 stability run`."""

    scale: Scale = "tiny"
    """tiny (minutes on a CPU), cifar (a GPU), imagenet (the paper's values)"""
    seeds: int | None = None
    """runs of each cell; empty = as the grid says"""
    executor: Literal["here", "slurm", "ray"] = "here"
    """this machine, a Slurm array (one task a cell), or a Ray cluster (extra [ray])"""
    runs_folder: Annotated[Path, tyro.conf.arg(name="runs")] = Path("runs/stability")
    """the grid's folder is made in here, as GRID-SCALE"""
    shards: str = ""
    """training shards of every cell; empty = drawn sample images (scale tiny)"""
    probes: str = ""
    """labelled held-out shards for the k-NN monitor"""
    launcher: str = ""
    """command line before train.py, e.g. "torchrun --nproc-per-node 8 --master-port {port}" ({port}
    becomes a free one); empty = deepspeed on a GPU, else plain python"""
    flags: str = ""
    """flags of train.py for every cell, in quotes: "--data.threads 2" for example"""
    workers: int = 1
    """cells at a time, here or of the Slurm array (there 0 = no limit)"""
    sbatch: str = ""
    """options for Slurm, in quotes: "--partition gpu --time 24:00:00" for example"""
    cpus: float = 1.0
    """CPUs of a cell on Ray"""
    gpus: float = 0.0
    """GPUs of a cell on Ray"""
    dry_run: bool = False
    """print the command line of each cell, and do nothing"""
