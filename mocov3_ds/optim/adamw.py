"""AdamW (arXiv 1711.05101) with per-tensor rules and signals, on whatever segments ZeRO gives.

Decay is decoupled in PyTorch's convention, w <- w - lr wd w - lr m̂ / (√v̂ + eps): at the same
hyper-parameters the weights are those of `torch.optim.AdamW`.

With `update_clip` it is StableAdamW (arXiv 2304.13013, Algorithm 2): each tensor's rate is divided
by max(1, RMS of g / √v̂), AdaFactor's update clip, so that a gradient that its stale second moment
underestimates cannot throw the weights. The rate, and with it the decay, is what shrinks.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.arguments import NamedParameters, number, pair_of_betas, switch
from mocov3_ds.optim.kernels import AdamTerms, Kernels
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.step_tables import NORMS, NORMS_AND_RMS, Plan, Share


class AdamW(ShardedOptimizer):
    """AdamW that gives the same weights under any ZeRO stage, and measures each tensor.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the tensors whose rule decays.
        bias_correction: whether the moments are corrected for starting at 0.
        update_clip: whether each tensor's rate is divided by max(1, RMS of g / √v̂).
        rule: (name, full shape) -> `Rule`.
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
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        update_clip: bool = False,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": number("lr", lr, 0),
            "betas": pair_of_betas(betas),
            "eps": number("eps", eps, 0),
            "weight_decay": number("weight_decay", weight_decay, 0),
            "bias_correction": switch("bias_correction", bias_correction),
            "update_clip": switch("update_clip", update_clip),
        }
        if update_clip and pair_of_betas(betas)[1] == 0:
            raise ValueError(
                "update_clip has no effect with betas[1] = 0: the second moment is the gradient's "
                "own square then and the RMS is 1; raise betas[1] or remove update_clip."
            )
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
        kernels.adam(
            share, weight, gradient, m, v, terms, sums_QS, None if group["update_clip"] else rate_S
        )

    def _needs(self, group: Mapping[str, Any]) -> int:
        return NORMS_AND_RMS if group["update_clip"] else NORMS

    def _ratio(self, plan: Plan, group: Mapping[str, Any], own_QS: Tensor) -> Tensor:
        if not group["update_clip"]:
            return torch.ones_like(plan.rate_S)
        return 1 / plan.rms.clamp_min(1.0)

    def _adapts(self, plan: Plan) -> Tensor:
        return torch.full_like(plan.adapt_S, bool(self.param_groups[0]["update_clip"]))

    def set_update_clip(self, on: bool) -> None:
        """Clip the coming steps' updates, or no longer."""
        for group in self.param_groups:
            group["update_clip"] = on

    def _move(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        plan: Plan,
    ) -> None:
        """Without `update_clip` no norm had to be known, so the first pass moved the weights."""
        if group["update_clip"]:
            kernels.move(share, share.flat.view(), gradient, plan.rate_S * plan.ratio_S)
