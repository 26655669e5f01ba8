"""A real engine with its momentum encoder, as the planning tests look at them."""

from typing import Any

import torch

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder


def start_encoders(
    shape: EncoderShape,
    zero: dict[str, int],
    *,
    precision: str,
    batch: int,
    chunks: Chunks,
    optimizer: str = "AdamW",
    measures_all: bool = False,
) -> tuple[Any, MomentumEncoder, torch.dtype]:
    """Engine over the base encoder, momentum encoder, and the dtype of views, on this rank.

    Args:
        shape: Architecture of both encoders.
        zero: The JSON's `zero_optimization` object.
        precision: Precision of the network: fp32, bf16 or fp16.
        batch: Images of a step over all ranks.
        chunks: How a rank's images go through the backbone.
        optimizer: Type of the optimizer, as a JSON names it.
        measures_all: Whether the optimizer measures all signals, or the norms alone.
    """
    # imported here, since a caller may want to wrap what these bind when they are imported
    from mocov3_ds.distributed import ranks
    from mocov3_ds.distributed.engine import full_tensors, start_engine
    from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
    from mocov3_ds.optim.build import build_optimizer
    from mocov3_ds.training.step import QueriesToLoss

    model = QueriesToLoss(BaseEncoder(shape), ContrastiveLoss(0.2), chunks=chunks)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    built = build_optimizer({"type": optimizer, "params": {"lr": 1e-3}}, named)
    built.measure_all(measures_all)
    settings: dict[str, Any] = {"zero_optimization": zero}
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    config = engine_config(settings, global_batch=batch, world_size=ranks.world_size())
    engine, dtype = start_engine(model, built, config), compute_dtype(config)
    encoder = MomentumEncoder(shape, dtype=dtype)
    encoder.start_from(dict(full_tensors(engine.module.base)))
    encoder.follow(engine.module.base)
    return engine, encoder, dtype
