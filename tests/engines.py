"""A real engine with its momentum encoder, as the planning tests look at them."""

from typing import Any

import torch

from mocov3_ds.model.base_encoder import BaseEncoder, Chunks, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder


def begin(
    shape: EncoderShape,
    zero: dict[str, int],
    *,
    precision: str,
    batch: int,
    chunks: Chunks,
    optimizer: str = "AdamW",
    watch: bool = False,
) -> tuple[Any, MomentumEncoder, torch.dtype]:
    """Engine over the base encoder, momentum encoder, and the dtype of views; of this rank.

    Args:
        shape: architecture.
        zero: the JSON's `zero_optimization`.
        precision: fp32, bf16 or fp16.
        batch: global batch.
        chunks: how images go through the backbone.
        optimizer: ours, by name.
        watch: whether it measures signals.
    """
    # here, since a caller may want to wrap what these bind when they are imported
    from mocov3_ds.distributed import ranks
    from mocov3_ds.distributed.engine import full_tensors, start_engine
    from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
    from mocov3_ds.optim.build import build_optimizer
    from mocov3_ds.training.step import QueriesToLoss

    model = QueriesToLoss(BaseEncoder(shape), temperature=0.2, chunks=chunks)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = build_optimizer({"type": optimizer, "params": {"lr": 1e-3}}, named)
    own.measure_all(watch)
    given: dict[str, Any] = {"zero_optimization": zero}
    if precision != "fp32":
        given[precision] = {"enabled": True}
    config = engine_config(given, global_batch=batch, world_size=ranks.world_size())
    engine, dtype = start_engine(model, own, config), compute_dtype(config)
    encoder = MomentumEncoder(shape, dtype=dtype)
    encoder.start_from(dict(full_tensors(engine.module.base)))
    encoder.follow(engine.module.base)
    return engine, encoder, dtype
