"""Sizes and kinds of a network as plain values: settings and planner know them without torch."""

from dataclasses import dataclass
from typing import Literal

Positions = Literal["sincos", "none"]


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """Size of a Vision Transformer; the MLP is four times as wide as the embedding."""

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12


# Table 2 of the paper; ViT-S has 12 heads there (6 in DeiT).
PAPER_SHAPES = {
    "vit_s16": VitShape(dim=384, depth=12, heads=12),
    "vit_b16": VitShape(dim=768, depth=12, heads=12),
    "vit_l16": VitShape(dim=1024, depth=24, heads=16),
    "vit_h14": VitShape(patch_size=14, dim=1280, depth=32, heads=16),
}


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """All that fixes the architecture of base and momentum encoder; see `vit.build_vit`."""

    vit: VitShape
    hidden: int = 4096
    """hidden width of projector and predictor"""
    out: int = 256
    """width of queries and keys"""
    positions: Positions = "sincos"
    train_patch_projection: bool = False
    drop_path: float = 0.0
    """stochastic depth rate of the base encoder's last block; the momentum encoder has none"""
    qk_norm: bool = False
