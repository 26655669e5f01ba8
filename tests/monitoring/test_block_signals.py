"""Attention and activations of all blocks against the blocks written out, and query-key norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3_ds.model.vit import VitShape, build_vit
from mocov3_ds.monitoring.block_signals import block_signals

SHAPE = VitShape(image_size=16, patch_size=4, dim=24, depth=3, heads=4)


def rms(x: Tensor) -> float:
    return math.sqrt(float((x.double() ** 2).mean()))


def written_out(vit: torch.nn.Module, x_BCHW: Tensor, index: int, rows: int) -> dict[str, float]:
    """One block by the textbook, from its input on; `rows` tokens look."""
    inputs: list[Tensor] = []
    block = vit.blocks[index]
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        vit(x_BCHW)
        handle.remove()
        attn, (x,) = block.attn, inputs
        batch, tokens, dim = x.shape
        qkv = attn.qkv(block.norm1(x))
        q, k, v = (part.view(batch, tokens, 4, dim // 4) for part in qkv.chunk(3, dim=-1))
        q, k = attn.q_norm(q)[:, :rows], attn.k_norm(k)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim // 4)
        p = logits.softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", p, v).reshape(batch, rows, dim)
        proj = attn.proj(mixed)
        middle = x[:, :rows] + proj
        fc2 = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(middle))))
    entropy_of_heads = -(p * p.log()).sum(-1).mean((0, 2))
    return {
        "max_logit": float(logits.abs().max()),
        "entropy": float(entropy_of_heads.mean()),
        "entropy_min": float(entropy_of_heads.min()),
        "qkv_rms": rms(qkv),
        "proj_rms": rms(proj),
        "fc2_rms": rms(fc2),
        "block_rms": rms(middle + fc2),
    }


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("class_token_only", [False, True])
def test_signals_are_those_of_blocks_written_out(qk_norm: bool, class_token_only: bool) -> None:
    torch.manual_seed(0)
    vit = build_vit(SHAPE, qk_norm=qk_norm, class_token_only=class_token_only).eval()
    for block in vit.blocks:
        block.attn.qkv.weight.data.mul_(3.0)
    x = torch.randn(5, 3, 16, 16)
    signals = block_signals(vit, x)
    for index in range(3):
        rows = 1 if class_token_only and index == 2 else 17
        for name, expected in written_out(vit, x, index, rows).items():
            assert signals.pop(f"block_{index}/{name}") == pytest.approx(expected, rel=1e-5), name
    assert not signals
    assert not any(module._forward_hooks for module in vit.modules())


def test_query_key_norm_bounds_the_logits() -> None:
    torch.manual_seed(0)
    x, largest = torch.randn(5, 3, 16, 16), {}
    for qk_norm in (False, True):
        vit = build_vit(SHAPE, qk_norm=qk_norm).eval()
        vit.blocks[1].attn.qkv.weight.data.mul_(30.0)
        largest[qk_norm] = block_signals(vit, x)["block_1/max_logit"]
    assert largest[True] <= math.sqrt(24 / 4) + 1e-4  # |q| = |k| = sqrt(d) after the norm
    assert largest[False] > 50


def test_another_kind_of_mlp_has_no_fc2() -> None:
    vit = build_vit(SHAPE)
    for block in vit.blocks:
        block.mlp = torch.nn.Identity()
    signals = block_signals(vit, torch.randn(2, 3, 16, 16))
    assert "block_1/proj_rms" in signals and "block_1/fc2_rms" not in signals
