"""AdamW (arXiv 1711.05101) with per-tensor rules and signals, on whatever segments ZeRO gives.

Decay is decoupled in PyTorch's convention, w <- w - lr wd w - lr m̂ / (√v̂ + eps): at the same
hyper-parameters the weights are those of `torch.optim.AdamW`. It moves 28 bytes per fp32 element
(reads w, g, m, v; writes w, m, v), which is the floor, since nothing must be known in advance.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import (
    GRADIENT,
    UPDATE,
    WEIGHT,
    NamedParameters,
    Plan,
    ShardedOptimizer,
    Share,
    number,
    pair_of_betas,
)


class AdamW(ShardedOptimizer):
    """AdamW that gives the same weights under any ZeRO stage, and measures each tensor.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the tensors whose rule decays.
        bias_correction: whether the moments are corrected for starting at 0.
        rule: (name, full shape) -> `Rule`.

    Raises:
        ValueError: an impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        rule: RuleFor = vit_rule,
    ) -> None:
        defaults = {
            "lr": number("lr", lr, 0),
            "betas": pair_of_betas(betas),
            "eps": number("eps", eps, 0),
            "weight_decay": number("weight_decay", weight_decay, 0),
            "bias_correction": bool(bias_correction),
        }
        super().__init__(named_parameters, defaults, rule)

    def _sweep(
        self, share: Share, gradient: Tensor, group: Mapping[str, Any], sums_3S: Tensor
    ) -> None:
        state = self.state[share.flat.tensor]
        weight, m, v = (share.flat.view(x) for x in (None, state["exp_avg"], state["exp_avg_sq"]))
        (b1, b2), step = group["betas"], state["step"]
        bias1, bias2 = (1 - b1**step, 1 - b2**step) if group["bias_correction"] else (1.0, 1.0)
        for segment in share.flat.segments:
            rule, row = share.rules[segment.index], share.row(segment)
            w_, g_, m_, v_ = (segment.of(x) for x in (weight, gradient, m, v))
            sums_3S[WEIGHT, row] += torch.linalg.vector_norm(w_).square()
            sums_3S[GRADIENT, row] += torch.linalg.vector_norm(g_).square()
            m_.lerp_(g_, 1 - b1)
            v_.mul_(b2).addcmul_(g_, g_, value=1 - b2)
            denominator = (v_.sqrt() / math.sqrt(bias2)).add_(group["eps"])
            torch.div(m_, denominator, out=g_)
            g_.div_(bias1)
            decay = group["weight_decay"] * rule.decay
            if decay:
                g_.add_(w_, alpha=decay)
            sums_3S[UPDATE, row] += torch.linalg.vector_norm(g_).square()

    def _apply(self, share: Share, gradient: Tensor, plan: Plan, group: Mapping[str, Any]) -> None:
        weight = share.flat.view()
        for segment in share.flat.segments:
            rate = group["lr"] * share.rules[segment.index].lr_multiplier
            segment.of(weight).add_(segment.of(gradient), alpha=-rate)
