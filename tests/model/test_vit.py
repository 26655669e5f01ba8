"""Sizes, positions and initialisation of the Vision Transformer."""

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from mocov3_ds.model import vit as vit_module
from mocov3_ds.model.vit import (
    PAPER_SHAPES,
    VitShape,
    attend_from_one,
    build_vit,
    sincos_positions,
)
from tests import reference

TINY = VitShape(image_size=32, patch_size=8, dim=48, depth=2, heads=4)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_positions_equal_the_closed_form(grid: tuple[int, int]) -> None:
    (rows, columns), dim = grid, 16
    ours = sincos_positions(grid, dim)[0].double()
    assert torch.equal(ours[0], torch.zeros(dim, dtype=torch.float64))
    for row in range(rows):
        for column in range(columns):
            token = ours[1 + row * columns + column]
            # fp32 rounding of values up to 1
            torch.testing.assert_close(
                token, reference.position(row, column, dim), atol=1e-7, rtol=0
            )


# Table 2 of the paper: blocks, width, heads, parameters in millions
@pytest.mark.parametrize(
    ("name", "depth", "dim", "heads", "millions"),
    [
        ("vit_s16", 12, 384, 12, 22),
        ("vit_b16", 12, 768, 12, 86),
        ("vit_l16", 24, 1024, 16, 304),
        ("vit_h14", 32, 1280, 16, 632),
    ],
)
def test_sizes_are_those_of_the_paper(
    name: str, depth: int, dim: int, heads: int, millions: int
) -> None:
    with torch.device("meta"):
        vit = build_vit(PAPER_SHAPES[name])
    assert (len(vit.blocks), vit.embed_dim) == (depth, dim)
    assert vit.blocks[0].attn.num_heads == heads
    assert vit.blocks[0].mlp.fc1.out_features == 4 * dim
    weights = sum(p.numel() for p in vit.parameters())
    assert abs(weights / 1e6 - millions) < max(0.5, 0.01 * millions)  # rounded there


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    vit = build_vit(VitShape(image_size=32, patch_size=8, dim=192, depth=1, heads=4))
    qkv = vit.blocks[0].attn.qkv
    bound = math.sqrt(6 / (192 + 192))  # each of q, k, v on its own
    assert 0.95 * bound < qkv.weight.abs().max() <= bound
    fc1 = vit.blocks[0].mlp.fc1
    bound = math.sqrt(6 / (192 + 768))
    assert 0.95 * bound < fc1.weight.abs().max() <= bound
    bound = math.sqrt(6 / (3 * 8 * 8 + 192))
    assert 0.95 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    for bias in (qkv.bias, fc1.bias, vit.patch_embed.proj.bias):
        assert not bias.any()
    assert 0 < vit.cls_token.abs().max() < 1e-5
    assert vit.norm.eps == 1e-6


def test_frozen_tensors() -> None:
    frozen = {n for n, p in build_vit(TINY).named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    trained = build_vit(TINY, train_patch_projection=True)
    assert {n for n, p in trained.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_without_positions_tokens_do_not_know_their_place() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    upside_down = torch.cat([image[:, :, 8 * i : 8 * i + 8] for i in (3, 2, 1, 0)], dim=2)
    with torch.no_grad():
        blind = build_vit(TINY, positions="none").eval()
        torch.testing.assert_close(blind(image), blind(upside_down), atol=1e-5, rtol=1e-5)
        seeing = build_vit(TINY).eval()
        assert (seeing(image) - seeing(upside_down)).abs().max() > 1e-3


def test_weights_load_into_timm() -> None:
    ours = build_vit(PAPER_SHAPES["vit_s16"]).eval()
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_divide_are_told() -> None:
    with pytest.raises(ValueError, match="image size 30 is not a multiple of the patch size 8"):
        build_vit(VitShape(image_size=30, patch_size=8, dim=48, depth=1, heads=4))
    with pytest.raises(ValueError, match=r"image size 30x32 .* choose e.g. 32"):
        build_vit(VitShape(image_size=30, image_width=32, patch_size=8, dim=48, depth=1, heads=4))
    with pytest.raises(ValueError, match="embedding 50 must be a multiple"):
        build_vit(VitShape(image_size=32, patch_size=8, dim=50, depth=1, heads=4))


def test_images_of_other_forms() -> None:
    shape = VitShape(image_size=16, image_width=40, patch_size=8, dim=48, depth=1, heads=4)
    vit = build_vit(replace(shape, channels=5))
    assert shape.grid == (2, 5) and vit.pos_embed.shape == (1, 11, 48)
    assert vit(torch.randn(2, 5, 16, 40)).shape == (2, 48)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"layer_scale": 0.3}], ids=str)
def test_the_class_token_alone_is_the_same_network(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = build_vit(TINY, drop_path=0.5, **changes).double()
    alone = build_vit(TINY, drop_path=0.5, **changes, class_token_only=True).double()
    alone.load_state_dict(whole.state_dict())  # the same names
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    features = []
    for vit in (whole, alone):
        torch.manual_seed(1)  # stochastic depth draws the same
        features.append(vit(images))
        torch.autograd.backward(features[-1].square().sum())
    torch.testing.assert_close(features[1], features[0], rtol=1e-12, atol=1e-12)
    theirs = dict(whole.named_parameters())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-10)
    assert alone.forward_features(images).shape == (6, 1, 48)


def test_attention_from_one_token_never_asks_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[bool, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note_and_attend(*args: torch.Tensor) -> torch.Tensor:
        asked = torch.backends.cuda
        names = ("cudnn", "flash", "mem_efficient", "math")
        allowed.append(tuple(getattr(asked, f"{name}_sdp_enabled")() for name in names))
        return attend(*args)

    monkeypatch.setattr(vit_module.F, "scaled_dot_product_attention", note_and_attend)
    q_BH1d, k_BHNd = torch.empty(2, 3, 1, 8, device="meta"), torch.empty(2, 3, 5, 8, device="meta")
    assert attend_from_one(q_BH1d, k_BHNd, k_BHNd).shape == (2, 3, 1, 8)
    assert allowed == [(False, True, True, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # other attention may still take it


def test_layer_scale_multiplies_each_branch() -> None:
    torch.manual_seed(0)
    vit = build_vit(TINY, layer_scale=1e-5).eval()
    gammas = {name: p for name, p in vit.named_parameters() if name.endswith("gamma")}
    assert [*gammas] == [
        f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)
    ]
    for gamma in gammas.values():
        assert gamma.requires_grad and torch.equal(gamma, torch.full((48,), 1e-5))
        with torch.no_grad():
            gamma.copy_(torch.rand(48))
    block = vit.blocks[0]
    x = torch.randn(2, 5, 48)
    middle = x + gammas["blocks.0.ls1.gamma"] * block.attn(block.norm1(x))
    after = middle + gammas["blocks.0.ls2.gamma"] * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(x), after)
