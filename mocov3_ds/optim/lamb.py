"""LAMB (arXiv 1904.00962) whose trust ratios are per tensor under every ZeRO stage."""

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


class Lamb(ShardedOptimizer):
    """LAMB that equals the unsharded optimizer on any world size.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay inside the adapted direction, for tensors whose rule decays.
        bias_correction: whether the moments are corrected for starting at 0, before the ratio.
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
        eps: float = 1e-6,
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

    def _ratio(self, plan: Plan, group: Mapping[str, Any]) -> Tensor:
        weight_S, update_S = plan.norms_S[WEIGHT], plan.norms_S[UPDATE]
        usable_S = (weight_S > 0) & (update_S > 0) & plan.adapt_S
        return torch.where(usable_S, weight_S / update_S, 1.0)

    def _apply(self, share: Share, gradient: Tensor, plan: Plan, group: Mapping[str, Any]) -> None:
        weight = share.flat.view()
        rate_S = plan.rate_S * plan.ratio_S
        for segment in share.flat.segments:
            factor = rate_S[share.row(segment)]
            segment.of(weight).addcmul_(segment.of(gradient), factor, value=-1)
