"""Linear layers that multiply in fp8 (e4m3), each row of a factor with a scale of its own.

    y = (s_x q_x) (s_w q_w)' + b        q = t / s rounded to e4m3, s = 2^(e - 7)

2^e is the largest power of two that is not above the row's largest magnitude, so that q is at most
256 (e4m3 ends at 448). A row of x is a token of an image, a row of W an output feature.

A row's scale and rounding depend on that row alone. So an image's features do not depend on the
images beside it: chunks, and any number of ranks, are one pass, as with products in bf16. A scale
for a whole tensor would make each chunk another computation. What holds for bf16 holds here: a
kernel that sums in another order for another number of rows changes last places, and a number at
the edge of two roundings then takes the other one, whose distance is fp8's.

In the backward, grad_x = grad W has a scale for each row of grad and each column of W; e4m3 as
well, as with scales by row three bits of mantissa help more than range. grad_W = grad' x sums over
the tokens of all images, whose scales would depend on the chunk: it stays in bf16. That is the
recipe `rowwise_with_gw_hp` of torchao (docs.pytorch.org/ao, torchao.float8), whose scales are
powers of two as well. Dividing by them is exact, and W, rounded by rows or by columns, is the same
numbers but for the smallest ones. Kept for the backward is what `nn.Linear` keeps.

Legend: O = features out, I = features in, R = rows (images and tokens), N = rows of the second
factor, K = what is summed over.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType, scaled_mm

from mocov3_ds.model.cpu_ops import linear

_MULTIPLE = 16
"""what the sizes of a product in fp8 must be multiples of on a GPU"""
_EXPONENT_BITS = 0x7F80
"""those of a bf16 number; alone they are the power of two below it, or infinity"""
_LARGEST_POWER = 128.0
"""power of two below the largest number of a scaled row"""
_SMALLEST = 2.0**-100
"""rows whose numbers are all below it are scaled as if it were their largest"""


class Fp8Linear(nn.Linear):
    """`nn.Linear` whose products are in fp8 where input and weight are bf16.

    In fp32 it is `nn.Linear`: derivatives that are measured beside a run are those of the function
    that is not rounded.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is nn.Linear's)
        """(..., I) -> (..., O)."""
        if not input.dtype == self.weight.dtype == torch.bfloat16:
            return linear(input, self.weight, self.bias)
        product: Tensor = _Product.apply(input, self.weight, self.bias)
        return product


class _Product(torch.autograd.Function):
    """Rows times weights, and the derivatives; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight_OI.requires_grad else None, weight_OI)
        product_RO = multiply_rows(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
        return product_RO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        gradient_RO = gradient.reshape(-1, gradient.shape[-1])
        grad_x = grad_weight_OI = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_RI = multiply_rows(gradient_RO, weight_OI.t())
            grad_x = grad_RI.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            grad_weight_OI = gradient_RO.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias_O = gradient_RO.sum(0)
        return grad_x, grad_weight_OI, grad_bias_O


def multiply_rows(a_RK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Product a b' + bias (R, N) of bf16 tensors in fp8; sums are fp32, the product bf16.

    Args:
        a_RK: rows of the first factor.
        b_NK: rows of the second factor.
        bias_N: added to each row.
    """
    quantised_RK, scale_R1 = quantise_rows(a_RK)
    quantised_NK, scale_N1 = quantise_rows(b_NK)
    by_row = ScalingType.RowWise
    return scaled_mm(
        quantised_RK, quantised_NK.t(), scale_R1, by_row, scale_N1.t(), by_row,
        bias=bias_N, output_dtype=torch.bfloat16,
    )  # fmt: skip


def quantise_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of bf16 in e4m3 (R, K), and the fp32 power of two (R, 1) that each was divided by.

    The scale of a row that is not finite is infinite, so that no product hides it (the conversion
    itself turns infinity into 448).
    """
    largest_R1 = torch.linalg.vector_norm(x_RK, math.inf, dim=-1, keepdim=True)
    bits_R1 = largest_R1.clamp_min(_SMALLEST).view(torch.int16) & _EXPONENT_BITS
    scale_R1 = bits_R1.view(torch.bfloat16) / _LARGEST_POWER
    scaled_RK = x_RK * scale_R1.reciprocal()  # exact, but for what e4m3 rounds to nothing
    return scaled_RK.to(torch.float8_e4m3fn).contiguous(), scale_R1.float()


def compute_in_fp8(blocks: nn.Module) -> None:
    """Let the linear layers of transformer blocks multiply in fp8; weights and names stay.

    Raises:
        ValueError: a size of theirs is not a multiple of 16.
    """
    for module in blocks.modules():
        if type(module) is not nn.Linear:
            continue
        if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
            raise ValueError(
                f"--model.fp8 needs layers whose sizes are multiples of {_MULTIPLE}, and one is "
                f"{module.in_features} x {module.out_features}; choose such a --model.dim, or "
                "leave the flag out."
            )
        module.__class__ = Fp8Linear
