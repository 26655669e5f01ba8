"""`mocov3 plan`: its flags, which are read before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mocov3_ds.settings import command_line


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what fits, how fast it runs and what it costs. Arithmetic alone: nothing is trained.

    mocov3 plan --recipe vit_l16 --batch 4096 --gpus 16x24GB
    mocov3 plan --recipe vit_h14 --gpus 64xH100-80GB --price_per_gpu_hour 2.5 --picture plan.png
    """

    recipe: str = "vit_b16"
    """what to train"""
    gpus: str = ""
    """COUNTxCARD: a preset (--list) or a memory, e.g. 8xH100-80GB, 16x24GB; 1 to 1024 cards"""
    batch: int = 0
    """global batch; 0 = the recipe's"""
    epochs: float = 0.0
    """length of the run; 0 = the recipe's"""
    compress: str = "off"
    """as in training: schedule by which patches of the images are left out at first"""
    nodes: int = 0
    """machines; 0 = as few as hold the cards, the same number each"""
    interconnect: float = 0.0
    """GB/s each way between two cards of a machine; 0 = the preset's"""
    network: float = 0.0
    """Gbit/s each way of a machine; 0 = the preset's"""
    reach: float = 0.0
    """share of the peak that matrix products reach; 0 = the preset's, see --list"""
    card: str = ""
    """name of a card of your own for --gpus, with --memory, --tflops and --bandwidth"""
    memory: float = 0.0
    """GiB of that card"""
    tflops: float = 0.0
    """its 10^12 operations a second of matrix products in bf16, dense"""
    bandwidth: float = 0.0
    """GB/s of its memory"""
    images: int = 0
    """images of your set, of which an epoch consists; 0 = ImageNet's 1,281,167"""
    cores: int = 0
    """CPU cores of a machine, which read and decode; 0 = as many as that takes"""
    stage: int | None = None
    """ZeRO stage; without it all are compared"""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON of the run; without it the recipe's, with each stage"""
    ds: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """one value of that JSON, as in training, e.g. --ds optimizer.type=Lamb (repeatable)"""
    tf32: bool = False
    """as in training: products of an fp32 run round their inputs to TF32"""
    price_per_gpu_hour: float = 0.0
    """price of a card and hour, in any currency"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print JSON instead of text"""
    picture: Path | None = None
    """PNG of what fills a card"""
    write_json: Path | None = None
    """write the DeepSpeed JSON of the best option"""
    rates: Path | None = None
    """measured rates: of a GPU by mocov3 gpu --json, for that card and no other, or of this
    machine's processor by --calibrate, for --gpus 1xcpu"""
    calibrate: Path | None = None
    """measure the processor's rates in some seconds (products, attention, copies) to a file; a file
    that mocov3 gpu wrote is read, as --rates reads it"""
    presets: Annotated[bool, tyro.conf.arg(name="list")] = False
    """list the cards that are known, with the source of each number"""
    what_fits: bool = False
    """table of what fits where, for ViT-B, L and H"""
    recipes: bool = False
    """table of the recipes with command, hours and the paper's accuracy"""
    critical_batch: str = ""
    """how large a batch still pays: a run folder whose log has the gradient noise scale, or that
    scale in images; steps and images to a target against --batch, the run's or the recipe's"""


def read_flags(arguments: Sequence[str]) -> PlanOptions:
    """The flags of a command line.

    Args:
        arguments: what follows `mocov3 plan`.

    Raises:
        SystemExit: tyro has printed help, or what is wrong.
    """
    return command_line.read_flags(PlanOptions, "mocov3 plan", arguments)
