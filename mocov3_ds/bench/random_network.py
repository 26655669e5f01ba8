"""A network with random weights under a real engine, and random views to run its steps on.

Shape suffixes: B = rank batch, C H W = image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine, full_tensors, start_engine
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.optim import AdamW
from mocov3_ds.training.step import QueriesToLoss, train_step


@dataclass
class RandomNetwork:
    """What a training step needs: an engine with AdamW, the momentum encoder, and two views."""

    engine: Engine[QueriesToLoss]
    optimizer: AdamW
    momentum_encoder: MomentumEncoder
    x1_BCHW: Tensor
    x2_BCHW: Tensor

    def run_step(self) -> float:
        """One step on the two views; returns its loss."""
        views = (self.x1_BCHW, self.x2_BCHW)
        return train_step(self.engine, self.momentum_encoder, *views, momentum=0.99).loss


def start_network(
    shape: EncoderShape,
    settings: Mapping[str, Any],
    *,
    batch: int,
    device: torch.device,
    lr: float = 0.0,
    chunks: Chunks | None = None,
    module: type[QueriesToLoss] = QueriesToLoss,
) -> RandomNetwork:
    """Start a network whose weights are the same on all ranks and at each call.

    Args:
        shape: architecture of the encoders.
        settings: DeepSpeed JSON without batch sizes and optimizer.
        batch: global batch over all ranks.
        device: the device of this rank.
        lr: learning rate; with 0 all steps have the same loss.
        chunks: how a rank's batch goes through the backbone; None = in one pass a view.
        module: class of the trained module.
    """
    config = engine_config(settings, global_batch=batch, world_size=ranks.world_size())
    dtype = compute_dtype(config)
    torch.manual_seed(0)
    model = module(BaseEncoder(shape), ContrastiveLoss(0.2), chunks=chunks)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    engine = start_engine(model.to(device), optimizer, config)
    momentum_encoder = MomentumEncoder(shape, device=device, dtype=dtype)
    momentum_encoder.start_from(dict(full_tensors(engine.module.base)))
    momentum_encoder.follow(engine.module.base)
    views = draw_views(shape, batch // ranks.world_size(), dtype, device)
    return RandomNetwork(engine, optimizer, momentum_encoder, *views)


def draw_views(
    shape: EncoderShape, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two views (B, C, H, W) of standard normal numbers, other ones on each rank."""
    generator = torch.Generator().manual_seed(ranks.rank())
    size = shape.vit.image_size
    first, second = (
        torch.empty(batch, 3, size, size, dtype=dtype).normal_(generator=generator).to(device)
        for _ in range(2)
    )
    return first, second
