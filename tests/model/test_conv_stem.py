"""Convolutions that make the tokens of a ViT: sizes and places of the published weights."""

import dataclasses

import pytest
import torch

from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.conv_stem import ConvStem
from mocov3_ds.model.shapes import CONV_STEM_SHAPES, EncoderShape
from tests.model.test_backbones import CONV


def test_each_convolution_halves_the_image() -> None:
    stem = ConvStem(img_size=(32, 48), patch_size=16, in_chans=4, embed_dim=16)
    assert stem.grid_size == (2, 3) and stem.num_patches == 6
    assert stem(torch.randn(2, 4, 32, 48)).shape == (2, 6, 16)


def test_a_vit_on_convolutions() -> None:
    backbone = build_backbone(EncoderShape(backbone=CONV))
    facts = describe_backbone(backbone, CONV)
    assert facts.rows_know_each_other and facts.groups == (
        "patch_embed", "cls", "block_0", "block_1", "norm"
    )  # fmt: skip
    stem = {n: tuple(t.shape) for n, t in backbone.named_parameters() if "patch_embed" in n}
    assert stem["patch_embed.proj.0.weight"] == (6, 3, 3, 3)
    assert stem["patch_embed.proj.6.weight"] == (24, 12, 3, 3)
    assert stem["patch_embed.proj.9.weight"] == (24, 24, 1, 1)
    assert all(p.requires_grad for n, p in backbone.named_parameters() if n != "pos_embed")
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    small = CONV_STEM_SHAPES["vit_conv_s16"]
    assert (small.dim, small.depth, small.heads) == (384, 11, 12)
    with pytest.raises(ValueError, match="a patch of 12"):
        odd = dataclasses.replace(CONV, patch_size=12, image_size=48)
        build_backbone(EncoderShape(backbone=odd))
