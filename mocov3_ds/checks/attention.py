"""Does attention give the same values and gradients, whichever of torch's backends computes it?

Looked at is the model's own code at the sizes of the paper's networks: the attention of a block,
from each token to all, and that of the last block, from the class token alone. What torch writes
out in fp32 on the CPU is the yardstick; bf16 rounds each factor to three digits.

Shape suffixes: B = images, N = tokens, D = width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mocov3_ds.checks.equivalence import relative_distance
from mocov3_ds.checks.finding import Finding, judge_errors
from mocov3_ds.model.shapes import PAPER_SHAPES
from mocov3_ds.model.vit import build_vit

CHOSEN = "as torch chooses"
BACKENDS: dict[str, SDPBackend | None] = {
    CHOSEN: None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
"""name -> backend; the last may end the process on cards where it fails"""
LIMIT = 3e-2  # of bf16 against fp32, largest of values and gradients
_IMAGES = 4


def check_attention(
    device: torch.device,
    recipe: str,
    backends: Sequence[str] = (*BACKENDS,),
    dtype: torch.dtype = torch.bfloat16,
) -> list[Finding]:
    """Compare both kinds of attention of a recipe's network, forward and backward.

    Args:
        device: the device of this rank.
        recipe: network of the paper.
        backends: names of `BACKENDS` to look at; one that does not run here is passed over.
        dtype: dtype of weights and tokens on the device.
    """
    shape = replace(PAPER_SHAPES[recipe], depth=2)
    torch.manual_seed(0)
    vit = build_vit(shape, class_token_only=True)
    tokens = (shape.image_size // shape.patch_size) ** 2 + 1
    x_BND = torch.randn(_IMAGES, tokens, shape.dim)
    findings = []
    for kind, block in zip(("block", "last block"), vit.blocks, strict=True):
        attention = block.get_submodule("attn")
        expected = _run_both_passes(attention, x_BND)
        copied = attention.to(device, dtype)
        errors = {}
        for name in backends:
            present = _try_backend(copied, x_BND.to(device, dtype), name)
            if present is not None:
                errors[name] = max(
                    relative_distance(tensor, reference)
                    for tensor, reference in zip(present, expected, strict=True)
                )
        findings.append(
            judge_errors(
                f"attention, {recipe}, {kind}",
                errors,
                LIMIT,
                "attention is wrong on this card: switch that backend off "
                "(torch.backends.cuda.enable_..._sdp) and report card, driver and versions.",
            )
        )
    return findings


def _try_backend(attention: nn.Module, x_BND: Tensor, name: str) -> list[Tensor] | None:
    """Output and gradients by a backend; None where this device does not have it."""
    backend = BACKENDS[name]
    context: AbstractContextManager[None] = (
        nullcontext() if backend is None else sdpa_kernel(backend)
    )
    try:
        with context:
            return _run_both_passes(attention, x_BND)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("No available kernel", "No viable backend")):
            return None
        raise


def _run_both_passes(attention: nn.Module, x_BND: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens and weights, for a fixed gradient of the output."""
    x_BND = x_BND.clone().requires_grad_()
    y_BND = attention(x_BND)
    generator = torch.Generator().manual_seed(1)
    pull_BND = torch.randn(y_BND.shape, generator=generator).to(y_BND)
    weights = [*attention.parameters()]
    gradients = torch.autograd.grad(y_BND, [x_BND, *weights], pull_BND)
    return [tensor.detach().cpu().float() for tensor in (y_BND, *gradients)]
