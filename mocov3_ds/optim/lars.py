"""LARS (arXiv 1708.03888) whose local rates are per tensor under every ZeRO stage."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.arguments import NamedParameters, number, switch, trust_bounds
from mocov3_ds.optim.kernels import Kernels, LarsTerms
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.step_tables import GRADIENT, WEIGHT, Plan, Share


class Lars(ShardedOptimizer):
    """LARS that equals the unsharded optimizer on any world size.

    With m the momentum and w a tensor of the model, as a whole,

        ratio = clip(trust_coeff |w| / (|g| + weight_decay |w| + eps))   (1 where |w| or |g| is 0)
        m <- momentum m + ratio (g + weight_decay w)
        w <- w - lr m

    The gradient is taken as it is given: clip it with DeepSpeed's `gradient_clipping`.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: learning rate.
        momentum: decay rate of the momentum.
        weight_decay: decay inside the adapted direction, for tensors whose rule decays.
        trust_coeff: the ratio's factor.
        eps: added to the ratio's denominator.
        nesterov: whether the step looks one momentum step ahead.
        trust_clip: smallest and largest trust ratio; no bounds by default.
        always_adapt: whether every tensor has a trust ratio, whatever its rule says.
        rule: (name, full shape) -> `Rule`. By default biases, norms and tokens neither decay nor
            adapt.
        backend: which kernels do the arithmetic; see `kernels`.

    Raises:
        ValueError: an impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coeff: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        trust_clip: tuple[float, float] | None = None,
        always_adapt: bool = False,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": number("lr", lr, 0),
            "momentum": number("momentum", momentum, 0, 1),
            "weight_decay": number("weight_decay", weight_decay, 0),
            "trust_coeff": number("trust_coeff", trust_coeff, 0),
            "eps": number("eps", eps, 0),
            "nesterov": switch("nesterov", nesterov),
            "trust_clip": trust_bounds(trust_clip),
            "always_adapt": switch("always_adapt", always_adapt),
        }
        super().__init__(named_parameters, defaults, rule, backend)

    def _sweep(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        sums_QS: Tensor,
        rate_S: Tensor,
    ) -> None:
        weight, momentum = self._views(share)
        kernels.lars_norms(share, weight, gradient, momentum, _terms(group), sums_QS)

    def _ratio(self, plan: Plan, group: Mapping[str, Any], own_QS: Tensor) -> Tensor:
        norms_3S = plan.norms
        weight_S, grad_S = norms_3S[WEIGHT], norms_3S[GRADIENT]
        decay_S = plan.decay_S * group["weight_decay"]
        ratio_S = group["trust_coeff"] * weight_S / (grad_S + decay_S * weight_S + group["eps"])
        if group["trust_clip"] is not None:
            ratio_S = ratio_S.clamp(*group["trust_clip"])
        adapt_S = plan.adapt_S | group["always_adapt"]
        return torch.where((weight_S > 0) & (grad_S > 0) & adapt_S, ratio_S, 1.0)

    def _move(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        plan: Plan,
    ) -> None:
        weight, momentum = self._views(share)
        kernels.lars_move(
            share, weight, gradient, momentum, _terms(group), plan.ratio_S, plan.rate_S
        )


def _terms(group: Mapping[str, Any]) -> LarsTerms:
    return LarsTerms(
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
    )
