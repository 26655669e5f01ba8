"""Base encoder of MoCo v3 (arXiv 2104.02057, Alg. 1): backbone, projector, predictor.

A query is `predictor(projector(backbone(view)))`; a key is made by the momentum encoder, which has
no predictor (`momentum.py`).

Shape suffixes: B = images, C H W = image, D = backbone features, P = projector and predictor
output.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.heads import build_predictor, build_projector
from mocov3_ds.model.vit import Positions, VitShape, build_vit


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """All that fixes the architecture of base and momentum encoder."""

    vit: VitShape
    hidden: int = 4096
    out: int = 256
    positions: Positions = "sincos"
    train_patch_projection: bool = False
    drop_path: float = 0.0
    qk_norm: bool = False


class BaseEncoder(nn.Module):
    """The trained network; its three parts keep their own state-dict prefixes."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.backbone = build_vit(
            shape.vit,
            positions=shape.positions,
            train_patch_projection=shape.train_patch_projection,
            drop_path=shape.drop_path,
            qk_norm=shape.qk_norm,
            class_token_only=True,
        )
        self.projector = build_projector(shape.vit.dim, shape.hidden, shape.out)
        self.predictor = build_predictor(shape.out, shape.hidden)
        suit_cpu(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Queries (B, P) of one view, in a single pass."""
        q_BP: Tensor = self.predictor(self.projector(self.backbone(x_BCHW)))
        return q_BP


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How a rank's batch goes through the backbone."""

    size: int = 0
    """images per pass; 0 or >= the rank's batch is one pass that keeps its activations"""
    kept: int = 0
    """chunks, counted from the end of the second view, that keep their activations for the backward
    instead of computing them again; the very last chunk always does, which costs no memory"""


def chunked_features(
    backbone: Callable[[Tensor], Tensor], x_BCHW: Tensor, chunk: int = 0, kept: int = 0
) -> Tensor:
    """Class-token features (B, D) of a whole rank batch, activations of one chunk at a time.

    A ViT body has LayerNorm only, so its rows do not know each other and the backbone may see the
    batch in pieces; projector, batch norm and loss must not. With gradients on, each chunk is a
    non-reentrant checkpoint region: its activations are recomputed when the backward reaches it,
    with the same random draws. Exact at each ZeRO stage, unlike hand-cached feature gradients.

    Args:
        backbone: maps (b, C, H, W) to (b, D) row by row.
        x_BCHW: the rank's whole batch of one view.
        chunk: images per piece; 0 or >= B runs one plain pass.
        kept: chunks at the end that keep their activations. The backward starts there, so one of
            them in the last view costs no memory at the peak and saves the forward of a chunk.
    """

    def class_tokens(x_BCHW: Tensor) -> Tensor:
        # the network returns a view of its last layer's output; a copy lets go of the other tokens
        return backbone(x_BCHW).contiguous()

    if chunk <= 0 or chunk >= len(x_BCHW):
        return class_tokens(x_BCHW)
    pieces = torch.split(x_BCHW, chunk)
    features = []
    for index, piece in enumerate(pieces):
        if torch.is_grad_enabled() and index < len(pieces) - kept:
            features.append(checkpoint(class_tokens, piece, use_reentrant=False))
        else:
            features.append(class_tokens(piece))
        # chunks must not share one autocast cast of a weight: their gradients would be summed in
        # the low precision (error growing with the square root of the number of chunks)
        torch.clear_autocast_cache()
    return torch.cat(features)
