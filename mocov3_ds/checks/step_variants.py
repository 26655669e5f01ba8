"""Are chunks one pass, and compiled blocks the written ones? The real step tells.

Each way starts from the same weights; compared are the loss and the gradients of one step.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.checks.equivalence import (
    MOMENTUM,
    Witness,
    gradient_error,
    rank_views,
    relative_difference,
    start_network,
)
from mocov3_ds.checks.finding import Finding, judge_errors
from mocov3_ds.distributed.engine import release_engine
from mocov3_ds.model.backbones import compile_blocks
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.training.step import QueriesToLoss, train_step

Prepare = Callable[[QueriesToLoss], object]
"""changes how a module that was just built runs"""


def check_chunks(device: torch.device) -> Finding:
    """Compare chunks of one, chunks with a crumb, and recomputed blocks with one pass.

    Args:
        device: the device of this rank.
    """
    ways: dict[str, Prepare] = {
        "chunks of 1": partial(_set_chunks, chunks=Chunks(size=1)),
        "chunks of 3, one kept": partial(_set_chunks, chunks=Chunks(size=3, keep=1)),
        "blocks recomputed": lambda module: _find_vit(module).set_grad_checkpointing(True),
    }
    return _judge_ways(
        "chunks = one pass",
        ways,
        device,
        2e-5,
        "chunks change the result: train with --chunk as large as a rank's batch, and report it.",
    )


def check_compiled(device: torch.device) -> Finding:
    """Compare compiled blocks with those that run line by line.

    Args:
        device: the device of this rank.
    """
    return _judge_ways(
        "compiled = as written",
        {"compiled blocks": lambda module: compile_blocks(module.base.backbone)},
        device,
        1e-4,
        "the compiler changes the result: train without --compile_blocks, and report versions.",
    )


def _find_vit(module: QueriesToLoss) -> VisionTransformer:
    assert isinstance(module.base.backbone, VisionTransformer)
    return module.base.backbone


def _set_chunks(module: QueriesToLoss, chunks: Chunks) -> None:
    module.chunks = chunks


def _judge_ways(
    name: str, ways: Mapping[str, Prepare], device: torch.device, limit: float, remedy: str
) -> Finding:
    loss, gradients = _run_step(device, lambda module: None)
    errors = {}
    for way, prepare in ways.items():
        loss_of_way, gradients_of_way = _run_step(device, prepare)
        errors[way] = max(
            relative_difference(loss_of_way, loss), gradient_error(gradients_of_way, gradients)
        )
    return judge_errors(name, errors, limit, remedy)


def _run_step(device: torch.device, prepare: Prepare) -> tuple[float, dict[str, Tensor]]:
    """Loss and reduced gradients of one step, fp64 on the CPU."""
    engine, momentum = start_network(1, device)
    witness = Witness(engine)
    try:
        prepare(engine.module)
        result = train_step(witness, momentum, *rank_views(0, device), momentum=MOMENTUM)
    finally:
        release_engine(engine)
    return result.loss, witness.gradients
