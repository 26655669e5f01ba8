"""One exact MoCo v3 step at any batch size: chunk the backbone, never the loss.

    view 1, view 2 -> backbone by chunks -> projector, predictor on the whole rank batch -> q1, q2
                   -> momentum encoder moved, then the same without gradient          -> k1, k2
    loss = ctr(q1, k2 of all ranks) + ctr(q2, k1 of all ranks)

The loss, the batch-norm statistics and the gradients depend on the global batch alone. One engine
forward, one backward, one gradient reduction.

Shape suffixes: V = the two views, B = rank batch, b = images of a chunk, G = global batch,
C H W = image, D = backbone features, P = head output, M = branches with stochastic depth,
K = patches that are kept, R = some rows of this rank.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from mocov3_ds.config.compression import StepLength
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine
from mocov3_ds.distributed.guarded_step import scale_is_exhausted, step_within
from mocov3_ds.model.backbones import has_compiled_blocks
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.chunking import Chunks, chunked_features, count_kept_chunks
from mocov3_ds.model.loss import PairLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder, ViewKeys
from mocov3_ds.model.sequence_length import shortened
from mocov3_ds.model.sigma_reparam import move_all_vectors
from mocov3_ds.model.stochastic_depth import find_branches, set_factors
from mocov3_ds.monitoring.profiler import StepPhase, phase, replace_phase_in_backward
from mocov3_ds.training.key_stream import KeyMaker, begin_keys


class ForwardResult(NamedTuple):
    """What the forward pass of a step computed on this rank; all but the loss is detached."""

    loss: Tensor
    """of this rank's queries, a scalar"""
    features_BD: Tensor
    """backbone features of view 1"""
    momentum_features_BD: Tensor
    """features of view 1 by the momentum encoder's backbone"""
    queries_BP: Tensor
    """queries of view 1"""
    keys_BP: Tensor
    """keys of view 2, the positives of these queries"""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What of images and network takes part in a step, drawn for each image of this rank."""

    factors_VBM: Tensor | None = None
    """stochastic depth, see `stochastic_depth.draw_factors`; None where the network has none"""
    query_patches_VBK: Tensor | None = None
    """places of the patches that the base encoder gets, see `token_dropout`; None = all"""
    key_patches_VBK: Tensor | None = None
    """places of the patches that the momentum encoder gets; None = all"""
    patch_scale: float = 1.0
    """side of a patch over that of a whole sequence"""
    length: StepLength | None = None
    """numbers of these patches, where the run compresses its sequences"""
    chunks: Chunks | None = None
    """how the rank's batch goes through the backbone in this step; None = as in any other"""

    def of_rows(self, rows_R: Tensor) -> "Draws":
        """What is drawn for some images of this rank."""

        def rows(both_VB: Tensor | None) -> Tensor | None:
            return None if both_VB is None else both_VB[:, rows_R]

        return replace(
            self,
            factors_VBM=rows(self.factors_VBM),
            query_patches_VBK=rows(self.query_patches_VBK),
            key_patches_VBK=rows(self.key_patches_VBK),
        )


NOTHING_DRAWN = Draws()


class QueriesToLoss(nn.Module):
    """What the engine owns and trains: the base encoder, and the loss of its queries.

    The keys come from a callable, not from a child module, so that the momentum encoder stays out
    of the engine's hands; it is called after the queries, as the paper's order demands.

    Args:
        base: the base encoder.
        loss: loss of the queries of one view against the keys of the other.
        chunks: how the rank's batch goes through the backbone; one pass by default.
    """

    def __init__(self, base: BaseEncoder, loss: PairLoss, *, chunks: Chunks | None = None) -> None:
        super().__init__()
        self.base = base
        self.loss = loss
        self.chunks = chunks or Chunks()

    def forward(
        self,
        x1_BCHW: Tensor,
        x2_BCHW: Tensor,
        make_keys: KeyMaker,
        draws: Draws = NOTHING_DRAWN,
    ) -> ForwardResult:
        """Loss of this rank's queries, and what was computed on the way to it."""
        features1_BD, features2_BD = self.features(x1_BCHW, x2_BCHW, draws)
        if features2_BD.requires_grad:  # the first of the two that the backward reaches
            replace_phase_in_backward(features2_BD, StepPhase.BACKWARD_OF_BACKBONES)
        return self.loss_of_features(features1_BD, features2_BD, make_keys)

    def loss_of_features(
        self, features1_BD: Tensor, features2_BD: Tensor, make_keys: KeyMaker
    ) -> ForwardResult:
        """Heads, keys and loss, given the backbone features of both views of this rank."""
        base = self.base
        with phase(StepPhase.HEADS):
            q1_BP = base.predictor(base.projector(features1_BD))
            q2_BP = base.predictor(base.projector(features2_BD))
        view1, view2 = make_keys()
        with phase(StepPhase.LOSS):
            loss = self._pair_loss(q1_BP, view2.keys_BP) + self._pair_loss(q2_BP, view1.keys_BP)
        return ForwardResult(
            loss, features1_BD.detach(), view1.features_BD, q1_BP.detach(), view2.keys_BP
        )

    def features(
        self, x1_BCHW: Tensor, x2_BCHW: Tensor, draws: Draws = NOTHING_DRAWN
    ) -> tuple[Tensor, Tensor]:
        """Backbone features (B, D) of both views, one after the other, chunk by chunk.

        Args:
            x1_BCHW: first views of this rank's part.
            x2_BCHW: second views of the same images.
            draws: what takes part in the step.
        """
        chunks = draws.chunks or self.chunks
        size = chunks.size
        kept1, kept2 = count_kept_chunks(chunks, len(x1_BCHW))
        factors1, factors2 = _each_view(draws.factors_VBM)
        patches1, patches2 = _each_view(draws.query_patches_VBK)
        run = partial(self._run_backbone, draws.patch_scale)
        fill = has_compiled_blocks(self.base.backbone)
        return (
            chunked_features(run, x1_BCHW, size, kept1, factors1, patches1, fill=fill),
            chunked_features(run, x2_BCHW, size, kept2, factors2, patches2, fill=fill),
        )

    def _run_backbone(
        self,
        patch_scale: float,
        x_bCHW: Tensor,
        factors_bM: Tensor | None,
        patches_bK: Tensor | None,
    ) -> Tensor:
        """Features (b, D) of a chunk; also what a chunk runs again in the backward."""
        backbone = self.base.backbone
        branches = [] if factors_bM is None else find_branches(backbone)
        if factors_bM is not None:
            set_factors(branches, factors_bM)
        with phase(StepPhase.BACKBONE), shortened(backbone, patches_bK, patch_scale):
            features_bD: Tensor = backbone(x_bCHW)
        if factors_bM is not None and features_bD.requires_grad:
            # blocks that run again in the backward of this pass need its factors, not the last ones
            features_bD.register_hook(  # type: ignore[no-untyped-call]
                lambda _: set_factors(branches, factors_bM)
            )
        return features_bD

    def _pair_loss(self, q_BP: Tensor, k_BP: Tensor) -> Tensor:
        k_GP = ranks.all_gather_cat(k_BP)
        return self.loss(q_BP, k_GP, ranks.rank() * len(q_BP))


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """mean over all ranks"""
    features_BD: Tensor
    """backbone features of view 1 on this rank, detached"""
    momentum_features_BD: Tensor
    """the momentum encoder's features of the same view"""
    pair: tuple[Tensor, Tensor]
    """queries of view 1 and keys of view 2 (B, P) on this rank, detached"""
    applied: bool
    """False where the weights stayed: fp16 overflowed (the loss scale was lowered), or the step was
    bad"""
    gradient_norm: float
    """norm of the whole gradient before clipping; not finite where the gradient is not"""
    bad_reason: str = ""
    """why the step was dropped, in words; empty where it was not, and for an fp16 overflow that a
    smaller loss scale can cure"""


def train_step(
    engine: Engine[QueriesToLoss],
    momentum_encoder: MomentumEncoder,
    x1_BCHW: Tensor,
    x2_BCHW: Tensor,
    *,
    momentum: float,
    draws: Draws = NOTHING_DRAWN,
    loss_limit: float = math.inf,
    norm_limit: float = math.inf,
    overlap_keys: bool = False,
) -> StepResult:
    """Queries, momentum move, keys, loss, backward and optimizer step on one global batch.

    A step whose loss or gradient is not finite, or above its limit, is dropped on all ranks before
    the optimizer sees it. The momentum encoder has made its move of that step by then, towards
    weights that are good: a dropped step is one whose update is zero.

    Args:
        engine: DeepSpeed engine over `QueriesToLoss`.
        momentum_encoder: momentum encoder that follows the engine's base encoder.
        x1_BCHW: first views of this rank's part, in the engine's dtype.
        x2_BCHW: second views of the same images, in the engine's dtype.
        momentum: momentum of the momentum encoder in this step.
        draws: what of images and network takes part in the step.
        loss_limit: largest loss that is trained on.
        norm_limit: largest norm of the whole gradient that is trained on.
        overlap_keys: compute the keys beside the queries, on another stream of the GPU.
    """
    chunk = (draws.chunks or engine.module.chunks).size

    def make_keys() -> tuple[ViewKeys, ViewKeys]:
        with phase(StepPhase.MOMENTUM):
            momentum_encoder.finish_move()
        with phase(StepPhase.KEYS):
            return make_both_keys(momentum_encoder, x1_BCHW, x2_BCHW, chunk, draws)

    with phase(StepPhase.MOMENTUM):
        momentum_encoder.begin_move(momentum)
        move_all_vectors(engine.module.base.backbone)
    if overlap_keys:
        make_keys = begin_keys(make_keys, x1_BCHW.device)
    forward: ForwardResult = engine(x1_BCHW, x2_BCHW, make_keys, draws)
    loss_sum = ranks.all_reduce_sum(forward.loss.detach().float().clone())
    with phase(StepPhase.BACKWARD), phase(StepPhase.BACKWARD_OF_HEADS):
        engine.backward(forward.loss)
    with phase(StepPhase.OPTIMIZER):
        scale_can_shrink = engine.fp16_enabled() and not scale_is_exhausted(engine)
        norm, loss = step_within(engine, norm_limit, loss_sum=loss_sum, loss_limit=loss_limit)
    applied, reason = engine.was_step_applied(), ""
    if not applied:
        reason = _bad_reason(loss, loss_limit, norm, norm_limit, scale_can_shrink)
    features, pair = forward.features_BD, (forward.queries_BP, forward.keys_BP)
    return StepResult(loss, features, forward.momentum_features_BD, pair, applied, norm, reason)


def make_both_keys(
    encoder: MomentumEncoder, x1_BCHW: Tensor, x2_BCHW: Tensor, chunk: int, draws: Draws
) -> tuple[ViewKeys, ViewKeys]:
    """Keys of view 1 and of view 2.

    Args:
        encoder: the momentum encoder after its move.
        x1_BCHW: first views of this rank's part.
        x2_BCHW: second views of the same images.
        chunk: images per pass of the backbone; 0 = all at once.
        draws: what takes part in the step.
    """
    patches1, patches2 = _each_view(draws.key_patches_VBK)
    view1 = encoder.make_keys(x1_BCHW, chunk, patches1, draws.patch_scale)
    return view1, encoder.make_keys(x2_BCHW, chunk, patches2, draws.patch_scale)


def _each_view(both_V: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if both_V is None else (both_V[0], both_V[1])


def _bad_reason(
    loss: float, loss_limit: float, norm: float, norm_limit: float, scale_can_shrink: bool
) -> str:
    """Why a step was dropped, in words; empty for an overflow that a smaller loss scale cures."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if loss > loss_limit:
        return f"the loss {loss:.4g} is above {loss_limit:.4g}"
    if not math.isfinite(norm):
        return "" if scale_can_shrink else "the gradient is not finite"
    return f"the gradient's norm {norm:.4g} is above {norm_limit:.4g}"
