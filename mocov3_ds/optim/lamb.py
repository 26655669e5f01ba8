"""LAMB (arXiv 1904.00962) whose trust ratios are per tensor under every ZeRO stage."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.arguments import (
    NamedParameters,
    number,
    pair_of_betas,
    switch,
    trust_bounds,
)
from mocov3_ds.optim.kernels import AdamTerms, Kernels
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.step_tables import NORMS, UPDATE, WEIGHT, Plan, Share


class Lamb(ShardedOptimizer):
    """LAMB that equals the unsharded optimizer on any world size.

    With m and v the moments of the gradient and w a tensor of the model, as a whole,

        u = m̂ / (√v̂ + eps) + weight_decay w
        w <- w - lr clip(|w| / |u|) u          (the ratio is 1 where |w| or |u| is 0)

    The gradient is taken as it is given: clip it with DeepSpeed's `gradient_clipping`.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay inside the adapted direction, for tensors whose rule decays.
        bias_correction: whether the moments are corrected for starting at 0, before the ratio.
        grad_averaging: whether the gradient enters the first moment times 1 - betas[0], or whole.
        trust_clip: smallest and largest trust ratio; no bounds by default.
        always_adapt: whether every tensor has a trust ratio, whatever its rule says.
        flat: what LAMB is under DeepSpeed's own handling: one ratio over all adapted elements of
            each flat tensor of this rank, so another algorithm on each number of ranks. There to
            be compared with.
        rule: (name, full shape) -> `Rule`. By default biases, norms and tokens neither decay nor
            adapt.
        backend: which kernels do the arithmetic; see `kernels`.

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
        grad_averaging: bool = True,
        trust_clip: tuple[float, float] | None = None,
        always_adapt: bool = False,
        flat: bool = False,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": number("lr", lr, 0),
            "betas": pair_of_betas(betas),
            "eps": number("eps", eps, 0),
            "weight_decay": number("weight_decay", weight_decay, 0),
            "bias_correction": switch("bias_correction", bias_correction),
            "grad_averaging": switch("grad_averaging", grad_averaging),
            "trust_clip": trust_bounds(trust_clip),
            "always_adapt": switch("always_adapt", always_adapt),
            "flat": switch("flat", flat),
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
        weight, m, v = self._views(share)
        terms = AdamTerms.of(group, self.state[share.flat.tensor]["step"])
        kernels.adam(share, weight, gradient, m, v, terms, sums_QS, None)

    def _ratio(self, plan: Plan, group: Mapping[str, Any], own_QS: Tensor) -> Tensor:
        adapt_S = plan.adapt_S | group["always_adapt"]
        norms_3S = _flat_norms(plan, own_QS, adapt_S) if group["flat"] else plan.norms
        return trust_ratio(norms_3S[WEIGHT], norms_3S[UPDATE], adapt_S, group["trust_clip"])

    def _move(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        plan: Plan,
    ) -> None:
        kernels.move(share, share.flat.view(), gradient, plan.rate_S * plan.ratio_S)


def trust_ratio(
    weight_S: Tensor, update_S: Tensor, adapt_S: Tensor, clip: tuple[float, float] | None
) -> Tensor:
    """|w| / |u| within `clip` where a tensor adapts and both norms are above 0, else 1; (S,)."""
    ratio_S = weight_S / update_S
    if clip is not None:
        ratio_S = ratio_S.clamp(*clip)
    return torch.where((weight_S > 0) & (update_S > 0) & adapt_S, ratio_S, 1.0)


def _flat_norms(plan: Plan, own_QS: Tensor, adapt_S: Tensor) -> Tensor:
    """Norms over a flat's adapted elements on this rank, for each of its tensors; (3, S)."""
    sums_3S = torch.where(adapt_S, own_QS[:NORMS], 0.0)
    for share in plan.shares:
        sums_3S[:, share.rows] = sums_3S[:, share.rows].sum(dim=1, keepdim=True)
    return sums_3S.sqrt()
