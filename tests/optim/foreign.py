"""Two optimizers that the product does not know, and their formulas in fp64 on whole tensors.

`Lion` has one state tensor and no kernels of its own; `SignSgd` has no state at all and a trust
ratio. They give what `ShardedOptimizer` asks for, and nothing more.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.build import register_optimizer
from mocov3_ds.optim.kernel_types import FlatStep, Quantity
from mocov3_ds.optim.plain_kernels import add_sums, square_sum
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.signals import StepFactors, StepSums

RATE, DECAY = 1e-2, 0.1
BETAS = (0.9, 0.99)


@register_optimizer
class Lion(ShardedOptimizer):
    """arXiv 2302.06675, Algorithm 2."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        named_parameters: Any,
        *,
        lr: float,
        weight_decay: float = DECAY,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(named_parameters, defaults, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        for segment in flat.share.flat.segments:
            row = flat.share.row(segment)
            decay = flat.group["weight_decay"] * flat.share.decay(segment)
            w, g, m = (segment.of(x) for x in flat.tensors)
            add_sums(sums_QS, row, w, g, m)
            u = torch.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + decay * w
            m.mul_(BETAS[1]).add_(g, alpha=1 - BETAS[1])
            sums_QS[Quantity.UPDATE, row] += square_sum(g.copy_(u))

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        flat.kernels.move_weights(flat, rate_S)


@register_optimizer
class SignSgd(ShardedOptimizer):
    """The sign of the gradient, scaled to the norm of an adapting tensor's weight."""

    moments: ClassVar[tuple[str, ...]] = ()
    has_trust_ratio: ClassVar[bool] = True

    def __init__(
        self, named_parameters: Any, *, lr: float, rule: RuleFor = vit_rule, backend: str = "auto"
    ) -> None:
        super().__init__(named_parameters, {"lr": lr}, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        for segment in flat.share.flat.segments:
            row, w, g = flat.share.row(segment), segment.of(flat.weight), segment.of(flat.gradient)
            add_sums(sums_QS, row, w, g, None)
            sums_QS[Quantity.UPDATE, row] += square_sum(g.sign_())

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        ratio_S = sums.norms[Quantity.WEIGHT] / sums.norms[Quantity.UPDATE].clamp_min(1e-30)
        adapt_S = sums.tables.adapt_S
        return StepFactors(torch.where(adapt_S, ratio_S, 1.0), adapt_S)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        flat.kernels.move_weights(flat, rate_S * factor_S)


class PlainOptimizer:
    """Both formulas in fp64 on whole tensors, with what the signals should say of each step."""

    def __init__(self, kind: str, weights: dict[str, Tensor], rule_for: RuleFor) -> None:
        self.kind = kind
        self.w = {name: w.double() for name, w in weights.items()}
        self.m = {name: torch.zeros_like(w) for name, w in self.w.items()}
        self.rules = {name: rule_for(name, tuple(w.shape)) for name, w in self.w.items()}

    def step(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Move the weights; signals of each tensor."""
        rows = {}
        for name, gradient in gradients.items():
            w, m, g, one = self.w[name], self.m[name], gradient.double(), self.rules[name]
            if self.kind == "Lion":
                u = torch.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + DECAY * one.decay * w
                self.m[name] = BETAS[1] * m + (1 - BETAS[1]) * g
                ratio, adapts = 1.0, 0.0
            else:
                u, adapts = torch.sign(g), float(one.adapt)
                ratio = float(w.norm() / u.norm()) if one.adapt else 1.0
            self.w[name] = w - RATE * one.lr_multiplier * ratio * u
            rows[name] = {
                "grad_norm": float(g.norm()),
                "update_norm": float(u.norm()),
                "weight_norm": float(w.norm()),
                "trust_ratio": ratio,
                "rate": RATE * one.lr_multiplier,
                "adapts": adapts,
                "grad_peak": float(g.abs().max()),
                "rms": float("nan"),
                "rms_before": float("nan"),
                "cosine": float((g * m).sum() / (g.norm() * m.norm())),
            }
        return rows
