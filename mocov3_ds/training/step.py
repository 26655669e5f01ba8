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

from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.guarded_step import DROP, step_within
from mocov3_ds.model.base_encoder import BaseEncoder, Chunks, chunked_features
from mocov3_ds.model.loss import contrastive_loss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.monitoring.profiler import phase, turns_into

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
        self.pair: tuple[Tensor, Tensor] | None = None
        """queries of view 1 and keys of view 2 (B, P) of the last forward, detached"""

    def forward(self, x1_BCHW: Tensor, x2_BCHW: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Loss of this rank's queries (scalar) and the features (B, D) of view 1, detached."""
        base = self.base
        features1_BD, features2_BD = self.features(x1_BCHW, x2_BCHW)
        if features2_BD.requires_grad:  # the first of the two that the backward reaches
            features2_BD.register_hook(turns_into("backbones"))  # type: ignore[no-untyped-call]
        with phase("heads"):
            q1_BP = base.predictor(base.projector(features1_BD))
            q2_BP = base.predictor(base.projector(features2_BD))
        k1_BP, k2_BP = keys()
        with phase("loss"):
            loss = self._contrast(q1_BP, k2_BP) + self._contrast(q2_BP, k1_BP)
        self.pair = q1_BP.detach(), k2_BP
        return loss, features1_BD.detach()

    def features(self, x1_BCHW: Tensor, x2_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features (B, D) of both views, one after the other, chunk by chunk."""
        size = self.chunks.size
        kept1, kept2 = kept_of_each_view(self.chunks, len(x1_BCHW))
        return (
            chunked_features(self._backbone, x1_BCHW, size, kept1),
            chunked_features(self._backbone, x2_BCHW, size, kept2),
        )

    def _backbone(self, x_BCHW: Tensor) -> Tensor:
        """Also what a chunk runs again in the backward."""
        with phase("backbone"):
            features_BD: Tensor = self.base.backbone(x_BCHW)
        return features_BD

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
    """False where the weights stayed: fp16 overflowed (the loss scale was lowered), or `trouble`"""
    gradient_norm: float
    """of the whole gradient, before clipping; not finite where it is not"""
    trouble: str = ""
    """why the step was dropped, in words; empty where it was not, and for an fp16 overflow"""


def train_step(
    engine: Any,
    momentum_encoder: MomentumEncoder,
    x1_BCHW: Tensor,
    x2_BCHW: Tensor,
    *,
    momentum: float,
    loss_limit: float = math.inf,
    norm_limit: float = math.inf,
) -> StepResult:
    """Queries, momentum move, keys, loss, backward and optimizer step on one global batch.

    A step whose loss or gradient is not finite, or above its limit, is dropped on all ranks before
    the optimizer sees it. The momentum encoder has made its move of that step by then, towards
    weights that are good: a dropped step is one whose update is zero.

    Args:
        engine: DeepSpeed engine over `QueriesToLoss`.
        momentum_encoder: follows the engine's base encoder.
        x1_BCHW: first views of this rank's part, in the engine's dtype.
        x2_BCHW: second views.
        momentum: of the momentum encoder, this step.
        loss_limit: largest loss that is trained on.
        norm_limit: largest norm of the whole gradient that is trained on.
    """
    chunk = engine.module.chunks.size

    def keys() -> tuple[Tensor, Tensor]:
        with phase("momentum"):
            momentum_encoder.finish()
        with phase("keys"):
            return momentum_encoder.keys(x1_BCHW, chunk), momentum_encoder.keys(x2_BCHW, chunk)

    with phase("momentum"):
        momentum_encoder.begin(momentum)
    loss, features_BD = engine(x1_BCHW, x2_BCHW, keys)
    mean_loss = float(ranks.all_reduce_sum(loss.detach().float().clone())) / ranks.world_size()
    with phase("backward"), phase("heads and loss"):
        engine.backward(loss)
    with phase("optimizer"):
        bad_loss = not mean_loss <= loss_limit or not math.isfinite(mean_loss)
        norm = step_within(engine, DROP if bad_loss else norm_limit)
    applied = bool(engine.was_step_applied())
    trouble = "" if applied else _trouble(engine, mean_loss, loss_limit, norm, norm_limit)
    return StepResult(mean_loss, features_BD, applied, norm, trouble)


def _trouble(engine: Any, loss: float, loss_limit: float, norm: float, norm_limit: float) -> str:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if loss > loss_limit:
        return f"the loss {loss:.4g} is above {loss_limit:.4g}"
    if not math.isfinite(norm):
        return "" if engine.fp16_enabled() else "the gradient is not finite"
    return f"the gradient's norm {norm:.4g} is above {norm_limit:.4g}"
