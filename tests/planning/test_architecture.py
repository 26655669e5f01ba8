"""Counts from the architecture against real modules: tensors, kept bytes, operations."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.heads import build_predictor, build_projector
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape, build_vit
from mocov3_ds.planning import architecture
from mocov3_ds.training import chunk_size

SMALL = EncoderShape(
    backbone=VitShape(image_size=32, patch_size=8, dim=36, depth=3, heads=3), hidden=50, out=14
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"positions": "none"},
        {"train_patch_projection": True},
        {"qk_norm": True},
        {"layer_scale": 0.1},
        {"sigma_reparam": True},
    ],
    ids=str,
)
def test_tensors_are_those_of_the_module(change: dict[str, Any]) -> None:
    shape = dataclasses.replace(SMALL, **change)
    real = BaseEncoder(shape).named_parameters()
    ours = [(t.name, t.numbers, t.trained) for t in architecture.list_tensors(shape)]
    assert ours == [(name, p.numel(), p.requires_grad) for name, p in real]
    momentum = sum(p.numel() for p in MomentumEncoder(shape).parameters())
    assert architecture.count_momentum_weights(shape) == momentum


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_s16", 22), ("vit_b16", 86), ("vit_l16", 304), ("vit_h14", 632)]
)
def test_backbones_have_the_papers_size(name: str, millions: float) -> None:
    shape = EncoderShape(backbone=PAPER_SHAPES[name])
    numbers = sum(
        t.numbers for t in architecture.list_tensors(shape) if t.name.startswith("backbone.")
    )
    assert numbers / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_s16", "vit_b16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_kept_bytes_of_the_papers_backbones(name: str, dtype: torch.dtype, recompute: bool) -> None:
    # three blocks of the real width and number of tokens: the rest of the depth is the same again
    shape = EncoderShape(backbone=dataclasses.replace(PAPER_SHAPES[name], depth=3))
    backbone = build_vit(shape.vit, class_token_only=True).to(dtype)
    backbone.set_grad_checkpointing(recompute)
    measured = chunk_size.activation_bytes(backbone, torch.zeros(1, 3, 224, 224, dtype=dtype))
    ours = architecture.backbone_bytes(shape, dtype.itemsize, recompute_blocks=recompute)
    assert ours == pytest.approx(measured, rel=0.02)


def test_kept_bytes_with_layer_scale() -> None:
    vit = dataclasses.replace(PAPER_SHAPES["vit_s16"], depth=3)
    shape = EncoderShape(backbone=vit, layer_scale=1e-5)
    backbone = build_vit(vit, layer_scale=1e-5, class_token_only=True)
    measured = chunk_size.activation_bytes(backbone, torch.zeros(1, 3, 224, 224))
    assert architecture.backbone_bytes(shape, 4) == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_s16", "vit_b16"])
def test_kept_bytes_at_full_depth(name: str, dtype: torch.dtype) -> None:
    shape = EncoderShape(backbone=PAPER_SHAPES[name])
    backbone = build_vit(shape.vit, class_token_only=True).to(dtype)
    measured = chunk_size.activation_bytes(backbone, torch.zeros(1, 3, 224, 224, dtype=dtype))
    assert architecture.backbone_bytes(shape, dtype.itemsize) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_of_the_heads(dtype: torch.dtype) -> None:
    projector = build_projector(384, 1024, 256).to(dtype)
    predictor = build_predictor(256, 1024).to(dtype)
    both = torch.nn.Sequential(projector, predictor)
    features = torch.zeros(1, 384, dtype=dtype)
    shape = EncoderShape(backbone=PAPER_SHAPES["vit_s16"], hidden=1024, out=256)
    measured = chunk_size.activation_bytes(both, features)
    # the measure does not count a module's own input
    ours = architecture.head_bytes(shape, dtype.itemsize) - features.nbytes
    assert ours == pytest.approx(measured, rel=0.02)


def operations_of(module: torch.nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Forward, and forward with backward, counted by torch."""
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count the fused attention of the CPU
        with FlopCounterMode(display=False) as forward:
            out = module(x)
        with FlopCounterMode(display=False) as backward:
            out.float().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("learns", [False, True])
def test_operations(learns: bool) -> None:
    shape = dataclasses.replace(SMALL, train_patch_projection=learns)
    base = BaseEncoder(shape)
    x = torch.randn(2, 3, 32, 32)
    forward, backward = operations_of(base.backbone, x)
    ours = architecture.forward_work(shape)
    assert forward == 2 * ours.operations
    assert backward == 2 * architecture.backward_work(shape).operations
    heads = torch.nn.Sequential(base.projector, base.predictor)
    features = torch.randn(2, shape.vit.dim, requires_grad=True)
    forward, backward = operations_of(heads, features)
    key, _ = operations_of(base.projector, features)
    assert forward + backward + key == 2 * architecture.heads_work(shape).operations


def test_operations_of_the_paper() -> None:
    """Its GMAC of a forward pass, whose last block computes each token."""
    for name, gmac in {"vit_s16": 4.6, "vit_b16": 17.5, "vit_l16": 61.3, "vit_h14": 166.7}.items():
        shape = EncoderShape(backbone=PAPER_SHAPES[name])
        longer = dataclasses.replace(shape.vit, depth=shape.vit.depth + 1)
        blocks = architecture.forward_work(dataclasses.replace(shape, backbone=longer))
        last = architecture.forward_work(
            dataclasses.replace(shape, backbone=dataclasses.replace(shape.vit, depth=1))
        )
        patch = (
            2 * (architecture.count_tokens(shape) - 1) * 3 * shape.vit.patch_size**2 * shape.vit.dim
        )
        ours = blocks.operations - last.operations + patch
        assert ours == pytest.approx(2 * gmac * 1e9, rel=0.01), name
        twice = architecture.step_work(shape, 2, recomputed=1.0)
        once = architecture.step_work(shape, 2, recomputed=0.0)
        assert twice.linear / once.linear == pytest.approx(10 / 8, rel=0.01)
