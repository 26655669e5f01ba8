"""Attention's extremes against attention written out, and query-key norm."""

import math

import pytest
import torch
from torch import Tensor

from mocov3_ds.model.vit import VitShape, build_vit
from mocov3_ds.monitoring.attention import attention_extremes, middle_and_ends

SHAPE = VitShape(image_size=16, patch_size=4, dim=24, depth=3, heads=4)


def written_out(vit: torch.nn.Module, x_BCHW: Tensor, index: int) -> tuple[float, float]:
    """Logits of one block by the textbook, from its input on."""
    inputs: list[Tensor] = []
    handle = vit.blocks[index].attn.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        vit(x_BCHW)
        handle.remove()
        attn, (x,) = vit.blocks[index].attn, inputs
        batch, tokens, dim = x.shape
        q, k, _ = attn.qkv(x).chunk(3, dim=-1)
        q, k = (
            norm(part.view(batch, tokens, 4, dim // 4).transpose(1, 2))
            for norm, part in ((attn.q_norm, q), (attn.k_norm, k))
        )
        logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(dim // 4)
        p = logits.softmax(-1)
    return float(logits.abs().max()), float(-(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("class_token_only", [False, True])
def test_extremes_are_those_of_attention_written_out(qk_norm: bool, class_token_only: bool) -> None:
    torch.manual_seed(0)
    vit = build_vit(SHAPE, qk_norm=qk_norm, class_token_only=class_token_only).eval()
    for block in vit.blocks:
        block.attn.qkv.weight.data.mul_(3.0)
    x = torch.randn(5, 3, 16, 16)
    extremes = attention_extremes(vit, x, middle_and_ends(3))
    assert set(extremes) == {0, 1, 2}
    for index, (logit, entropy) in extremes.items():
        expected = written_out(vit, x, index)
        assert (logit, entropy) == pytest.approx(expected, rel=1e-5)
        assert 0 < entropy < math.log(17)
    assert not any(module._forward_hooks for module in vit.modules())


def test_query_key_norm_bounds_the_logits() -> None:
    torch.manual_seed(0)
    x, largest = torch.randn(5, 3, 16, 16), {}
    for qk_norm in (False, True):
        vit = build_vit(SHAPE, qk_norm=qk_norm).eval()
        vit.blocks[1].attn.qkv.weight.data.mul_(30.0)
        largest[qk_norm] = attention_extremes(vit, x, (1,))[1][0]
    assert largest[True] <= math.sqrt(24 / 4) + 1e-4  # |q| = |k| = sqrt(d) after the norm
    assert largest[False] > 50
