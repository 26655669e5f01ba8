"""Does the momentum encoder move as its formula says, and is the copy its master, rounded?"""

import torch
from torch import Tensor

from mocov3_ds.checks.equivalence import relative_distance
from mocov3_ds.checks.finding import Finding, judge_errors
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape

# sizes that fill no block, and weights of 3 x 12 x 100 numbers
_SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=36, depth=2, heads=3), hidden=100, out=20
)
_MOMENTUMS = (0.99, 0.9, 0.25)  # beyond one half the other of lerp's formulas is used
_LIMIT = 3e-7  # fp32's rounding


def check_momentum(device: torch.device) -> Finding:
    """Move a small encoder three times in each dtype, and compare it with fp64.

    Args:
        device: the device of this rank.
    """
    errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors[str(dtype).removeprefix("torch.")] = _largest_error(device, dtype)
    return judge_errors(
        "momentum encoder's kernel = formula",
        errors,
        _LIMIT,
        "the Triton kernel computes something else on this card: uninstall triton, and torch moves "
        "the encoder; report card, driver and versions.",
    )


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of the masters, relative to their size; infinite where a copy is not its master, rounded."""
    torch.manual_seed(0)
    base = BaseEncoder(_SHAPE).to(device)
    encoder = MomentumEncoder(_SHAPE, device=device, dtype=dtype)
    encoder.start_from(dict(base.state_dict()))
    base.to(dtype)
    encoder.follow(base)
    trained = {name for name, tensor in base.named_parameters() if tensor.requires_grad}
    exact = {n: t.cpu().double() for n, t in encoder.full_state() if n in trained}
    for momentum in _MOMENTUMS:
        _shift_weights(base)
        encoder.begin_move(momentum)
        encoder.finish_move()
        weights = {n: p.detach().cpu().double() for n, p in base.named_parameters()}
        exact = {n: momentum * k + (1 - momentum) * weights[n] for n, k in exact.items()}
    masters: dict[str, Tensor] = dict(encoder.full_state())
    copies = dict(encoder.named_parameters())
    rounded = all(torch.equal(masters[n].to(dtype), copies[n]) for n in exact)
    error = max(relative_distance(masters[n], exact[n], floor=1e-3) for n in exact)
    return error if rounded and error == error else float("inf")


@torch.no_grad()
def _shift_weights(base: BaseEncoder) -> None:
    """As an optimizer's step does, by numbers that are the same on each device."""
    generator = torch.Generator().manual_seed(1)
    for tensor in base.parameters():
        if tensor.requires_grad:
            step = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.add_(step.to(tensor))
