"""Linear layers and attention on a CPU, where torch's own choice is the slow one.

For fp32 torch asks MKL for matrix products, which keeps to AVX2 on processors that are not Intel's;
oneDNN, in the same wheel, uses AVX-512 there and is more than twice as fast. For bf16 torch's fused
attention takes two to three times as long as its products written out (BENCHMARKS.md, "One step
and its variants"). What is asked depends on the processor and the layer alone, so that a run gives
the same bits each time; sums are taken in the same precision, in another order.

Shape suffixes: R = rows (images and tokens), I = features in, O = features out; B = images,
H = heads, M = tokens that look, N = tokens that are looked at, D = width of a head.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import attention as timm_attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST_WEIGHT = 2**14
"""numbers of a weight from which on the faster product outweighs a longer call"""
_SCORES = 2**21
"""attention scores written out at once: a few images, so that they stay in the cache"""


@lru_cache
def onednn_leads() -> bool:
    """Whether oneDNN beats what torch would take: with AVX-512 on a processor not of Intel."""
    return (
        bool(torch._C.has_mkl and torch._C._has_mkldnn)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and not _is_intel_cpu()
    )


def _is_intel_cpu() -> bool:
    """Whether the processor is Intel's; also true where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def suit_cpu(network: nn.Module, smallest_weight: int = SMALLEST_WEIGHT) -> None:
    """Make the large linear layers and the attention of `network` take the faster way on a CPU.

    Names, weights and results (to rounding) stay. On a GPU, under autocast and in compiled code
    they do what torch and timm do.

    Args:
        network: module whose layers are changed in place.
        smallest_weight: numbers of a linear layer's weight from which on it is changed.
    """
    if not onednn_leads():
        return
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.numel() >= smallest_weight:
            module.__class__ = Linear
        elif type(module) is timm_attention.Attention:
            module.__class__ = Attention


def _has_own_way(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` is a tensor of `dtype` that this file computes with in its own way."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == dtype
        and not torch.is_autocast_enabled("cpu")
        and onednn_leads()
    )


# -- linear layers, fp32 ---------------------------------------------------------------------------


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is nn.Linear's)
        """(..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Rows times weights, (..., I) -> (..., O), as `F.linear` computes it."""
    if not (_has_own_way(x_RI, torch.float32) and weight_OI.dtype == torch.float32):
        return F.linear(x_RI, weight_OI, bias_O)
    if torch.is_grad_enabled():
        return _Product.apply(x_RI, weight_OI, bias_O)
    return _onednn_product(x_RI, weight_OI, bias_O)


def _onednn_product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Through oneDNN, whatever the strides."""
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


class _Product(torch.autograd.Function):
    """The product and its derivatives, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        return _onednn_product(x_RI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        gradient_RO, x_RI = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn_product(gradient_RO, weight_OI.t()).view(x.shape) if needs_x else None,
            _onednn_product(gradient_RO.t(), x_RI.t()) if needs_weight else None,
            gradient_RO.sum(0) if needs_bias else None,
        )


# -- attention, bf16 -------------------------------------------------------------------------------


class Attention(timm_attention.Attention):
    """timm's attention by `attend`, for what a ViT of ours has: no masks, gates or dropout."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if attn_mask is not None or is_causal or not _has_own_way(x, torch.bfloat16):
            return super().forward(x, attn_mask, is_causal)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        values_BHND = attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj(values_BHND.transpose(1, 2).reshape(batch, tokens, self.attn_dim))


def attend(q_BHMD: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(D), (B, H, M, D), as torch's, which keeps no scores."""
    if not _has_own_way(q_BHMD, torch.bfloat16):
        return F.scaled_dot_product_attention(q_BHMD, k_BHND, v_BHND)
    return _Attend.apply(q_BHMD, k_BHND, v_BHND)


class _Attend(torch.autograd.Function):
    """A few images at a time; scores are computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, q_BHMD: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        ctx.save_for_backward(q_BHMD, k_BHND, v_BHND)
        batch, heads, rows, width = q_BHMD.shape
        # as it will be read: the heads of a token side by side
        out_BMHD = q_BHMD.new_empty(batch, rows, heads, width)
        for images in _image_slices(q_BHMD, k_BHND):
            q, k, v = (x[images].flatten(0, 1) for x in (q_BHMD, k_BHND, v_BHND))
            values = torch.bmm(_softmax_scores(q, k), v)
            out_BMHD[images] = values.view(-1, heads, rows, width).transpose(1, 2)
        return out_BMHD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = ctx.saved_tensors
        scale = inputs[0].shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in inputs)
        for images in _image_slices(*inputs[:2]):
            q, k, v, gradient = (x[images].flatten(0, 1) for x in (*inputs, gradient_BHMD))
            weights = _softmax_scores(q, k)
            grad_weights = torch.bmm(gradient, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores *= scale
            grad_q[images] = torch.bmm(grad_scores, k).view_as(grad_q[images])
            grad_k[images] = torch.bmm(grad_scores.transpose(1, 2), q).view_as(grad_k[images])
            grad_v[images] = torch.bmm(weights.transpose(1, 2), gradient).view_as(grad_v[images])
        return grad_q, grad_k, grad_v


def _image_slices(q_BHMD: Tensor, k_BHND: Tensor) -> list[slice]:
    """Slices of the batch whose scores are written out together."""
    batch, heads, rows, _ = q_BHMD.shape
    images = max(1, _SCORES // (heads * rows * k_BHND.shape[2]))
    return [slice(first, first + images) for first in range(0, batch, images)]


def _softmax_scores(q_HMD: Tensor, k_HND: Tensor) -> Tensor:
    """Softmax of the scaled scores, (heads of all images, M, N)."""
    no_bias = q_HMD.new_zeros(()).expand(len(q_HMD), q_HMD.shape[1], k_HND.shape[1])
    scale = q_HMD.shape[-1] ** -0.5
    return torch.baddbmm(no_bias, q_HMD, k_HND.transpose(1, 2), beta=0, alpha=scale).softmax(-1)
