"""One exact MoCo v3 step at any batch size: chunk the backbone, never the loss.

    view 1, view 2 -> backbone by chunks -> projector, predictor on the whole rank batch -> q1, q2
                   -> momentum encoder moved, then the same without gradient          -> k1, k2
    loss = ctr(q1, k2 of all ranks) + ctr(q2, k1 of all ranks)

The loss, the batch-norm statistics and the gradients depend on the global batch alone. One engine
forward, one backward, one gradient reduction.

Shape suffixes: B = rank batch, G = global batch, C H W = image, D = backbone features, P = head
output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.loss import contrastive_loss
from mocov3_ds.model.moco import BaseEncoder, Chunks, chunked_features
from mocov3_ds.model.momentum import MomentumEncoder

Keys = Callable[[], tuple[Tensor, Tensor]]


class QueriesToLoss(nn.Module):
    """What the engine owns: the base encoder, and the loss of its queries against given keys.

    The keys come from a callable, not from a child module, so that the momentum encoder stays out
    of the engine's hands; it is called after the queries, as the paper's order demands.
    """

    def __init__(
        self,
        base: BaseEncoder,
        *,
        temperature: float,
        chunks: Chunks | None = None,
        key_block: int = 0,
    ) -> None:
        super().__init__()
        self.base = base
        self.chunks = chunks or Chunks()
        self.temperature, self.key_block = temperature, key_block

    def forward(self, x1_BCHW: Tensor, x2_BCHW: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Loss of this rank's queries (scalar) and the features (B, D) of view 1, detached."""
        base, size = self.base, self.chunks.size
        kept1, kept2 = kept_of_each_view(self.chunks, len(x1_BCHW))
        features1_BD = chunked_features(base.backbone, x1_BCHW, size, kept1)
        features2_BD = chunked_features(base.backbone, x2_BCHW, size, kept2)
        q1_BP = base.predictor(base.projector(features1_BD))
        q2_BP = base.predictor(base.projector(features2_BD))
        k1_BP, k2_BP = keys()
        loss = self._contrast(q1_BP, k2_BP) + self._contrast(q2_BP, k1_BP)
        return loss, features1_BD.detach()

    def _contrast(self, q_BP: Tensor, k_BP: Tensor) -> Tensor:
        k_GP = ranks.all_gather_cat(k_BP)
        first_key = ranks.rank() * len(q_BP)
        return contrastive_loss(q_BP, k_GP, first_key, self.temperature, self.key_block)


def kept_of_each_view(chunks: Chunks, batch: int) -> tuple[int, int]:
    """Chunks of view 1 and view 2 that keep their activations, counted from the end of each."""
    of_a_view = math.ceil(batch / chunks.size) if chunks.size else 1
    kept = min(chunks.kept + 1, 2 * of_a_view)
    return max(kept - of_a_view, 0), min(kept, of_a_view)


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """mean over all ranks"""
    features_BD: Tensor
    """backbone features of view 1 on this rank, detached"""
    applied: bool
    """False where fp16 overflowed: the weights stayed, the loss scale was lowered"""


def train_step(
    engine: Any,
    momentum_encoder: MomentumEncoder,
    x1_BCHW: Tensor,
    x2_BCHW: Tensor,
    *,
    momentum: float,
) -> StepResult:
    """Queries, momentum move, keys, loss, backward and optimizer step on one global batch.

    Args:
        engine: DeepSpeed engine over `QueriesToLoss`.
        momentum_encoder: follows the engine's base encoder.
        x1_BCHW: first views of this rank's part, in the engine's dtype.
        x2_BCHW: second views.
        momentum: of the momentum encoder, this step.

    Raises:
        FloatingPointError: the loss is not finite; nothing was stepped.
    """
    chunk = engine.module.chunks.size

    def keys() -> tuple[Tensor, Tensor]:
        momentum_encoder.finish()
        return momentum_encoder.keys(x1_BCHW, chunk), momentum_encoder.keys(x2_BCHW, chunk)

    momentum_encoder.begin(momentum)
    loss, features_BD = engine(x1_BCHW, x2_BCHW, keys)
    mean_loss = float(ranks.all_reduce_sum(loss.detach().float().clone())) / ranks.world_size()
    if not torch.isfinite(torch.tensor(mean_loss)):
        raise FloatingPointError(f"the loss is {mean_loss}")
    engine.backward(loss)
    engine.step()
    return StepResult(mean_loss, features_BD, applied=bool(engine.was_step_applied()))
