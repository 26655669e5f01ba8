"""Larger patches of the same image: what the resized filters and positions mean."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.model.backbones import build_backbone, describe_backbone
from mocov3_ds.model.patch_scale import resize_filters, resize_positions
from mocov3_ds.model.sequence_length import shortened
from mocov3_ds.model.shapes import EncoderShape, TimmShape, VitShape, scaled_grid


@pytest.mark.parametrize(("stored", "side"), [(4, 8), (4, 6), (16, 28), (5, 5)])
def test_resized_filters_answer_an_enlarged_patch_as_the_stored_ones_answer_the_patch(
    stored: int, side: int
) -> None:
    torch.manual_seed(0)
    weight, patch = torch.randn(6, 3, stored, stored), torch.randn(4, 3, stored, stored)
    enlarged = F.interpolate(patch, size=(side, side), mode="bilinear")
    resized = resize_filters(weight, side)
    answers = torch.einsum("bchw,dchw->bd", enlarged, resized)
    expected = torch.einsum("bchw,dchw->bd", patch, weight)
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    # and of all filters that do so the shortest one, as timm's, which inverts in fp32
    timms = resample_patch_embed(weight, [side, side], interpolation="bilinear", antialias=False)
    torch.testing.assert_close(resized, timms, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_stored_filters() -> None:
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize_filters(w, 6), weight)


def test_a_position_is_the_mean_of_those_that_its_patch_covers() -> None:
    positions = torch.randn(1, 4 * 6, 5)
    table = positions[0].reshape(4, 6, 5)
    resized = resize_positions(positions, (4, 6), (2, 3))[0].reshape(2, 3, 5)
    torch.testing.assert_close(resized[1, 2], table[2:4, 4:6].mean((0, 1)))
    odd = resize_positions(positions, (4, 6), (4, 4))[0].reshape(4, 4, 5)
    torch.testing.assert_close(odd[0, 1], (0.5 * table[0, 1] + table[0, 2]) / 1.5)


def plain_features(vit: VisionTransformer, x: Tensor, scale: int) -> Tensor:
    """Features with patches so many times as large, in a plain writing."""
    side = vit.patch_embed.patch_size[0]
    weight = resample_patch_embed(
        vit.patch_embed.proj.weight, [side * scale] * 2, interpolation="bilinear", antialias=False
    )
    tokens_BDHW = F.conv2d(x, weight, vit.patch_embed.proj.bias, stride=side * scale)
    table_1DHW = vit.pos_embed[:, 1:].transpose(1, 2).unflatten(2, vit.patch_embed.grid_size)
    tokens = (tokens_BDHW + F.avg_pool2d(table_1DHW, scale)).flatten(2).transpose(1, 2)
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return vit.forward_head(vit.norm(vit.blocks(torch.cat([first, tokens], dim=1))))


@pytest.mark.parametrize(
    "backbone",
    [
        VitShape(image_size=16, image_width=32, patch_size=4, dim=16, depth=2, heads=2),
        TimmShape(
            name="vit_tiny_patch16_224",
            size=(16, 16),
            arguments=("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2"),
        ),
    ],
)
def test_features_are_those_of_larger_patches(backbone: VitShape | TimmShape) -> None:
    torch.manual_seed(0)
    network = build_backbone(EncoderShape(backbone=backbone)).eval()
    assert isinstance(network, VisionTransformer)
    x = torch.randn(2, 3, *backbone.size)
    whole = network(x)
    with shortened(network, None, 2.0):
        features = network(x)
    torch.testing.assert_close(features, plain_features(network, x, 2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features, whole, atol=1e-3)
    assert torch.equal(network(x), whole)
    assert describe_backbone(network, backbone).patch_size == 4


def test_scales_that_do_not_divide_are_refused_with_those_that_do() -> None:
    assert scaled_grid((224, 224), 16, 2.0) == (7, 7)
    assert scaled_grid((224, 112), 16, 1.75) == (8, 4)
    for scale in (1.5, 1.01):
        with pytest.raises(ValueError, match=r"possible scales are 1, 1\.75, 2, 3\.5"):
            scaled_grid((224, 224), 16, scale)
