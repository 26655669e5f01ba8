"""LARS (arXiv 1708.03888) whose local rates are per tensor under every ZeRO stage."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.arguments import (
    NamedParameters,
    check_number,
    check_switch,
    check_trust_clip,
    translate_coefficients,
)
from mocov3_ds.optim.kernel_types import FlatStep, Quantity
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.signals import StepFactors, StepSums


class Lars(ShardedOptimizer):
    """LARS that equals the unsharded optimizer on any world size.

    With m the momentum and w a tensor of the model, as a whole,

        ratio = clip(trust_coeff |w| / (|g| + weight_decay |w| + eps))   (1 where |w| or |g| is 0)
        m <- momentum m + ratio (g + weight_decay w)
        w <- w - lr m

    The gradient is taken as it is given: clip it with DeepSpeed's `gradient_clipping`.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: Learning rate of tensors whose rule has no multiplier.
        momentum: Decay rate of the momentum, in [0, 1).
        weight_decay: Decay inside the adapted direction, for tensors whose rule decays.
        trust_coeff: Factor of the trust ratio, 0 or above.
        eps: Number that is added to the ratio's denominator.
        nesterov: Whether the step looks one momentum step ahead.
        trust_clip: Smallest and largest trust ratio; no bounds by default.
        always_adapt: Whether every tensor has a trust ratio, whatever its rule says.
        rule: Function of a tensor's name and full shape that gives its `Rule`. By default biases,
            norms and tokens neither decay nor adapt.
        backend: Which kernels do the arithmetic; see `kernels`.

    Raises:
        ValueError: An impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    hints: ClassVar[Mapping[str, str]] = {
        "update_clip": "the trust ratio sets the length of the step; use trust_clip, or AdamW"
    }
    has_trust_ratio: ClassVar[bool] = True

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
            "lr": check_number("lr", lr, 0),
            "momentum": check_number("momentum", momentum, 0, 1),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "trust_coeff": check_number("trust_coeff", trust_coeff, 0),
            "eps": check_number("eps", eps, 0),
            "nesterov": check_switch("nesterov", nesterov),
            "trust_clip": check_trust_clip(trust_clip),
            "always_adapt": check_switch("always_adapt", always_adapt),
        }
        super().__init__(named_parameters, defaults, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """Measure the norms; the momentum waits for the ratio."""
        flat.kernels.measure_lars(flat, sums_QS)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Update the momentum and move the weights."""
        flat.kernels.move_lars(flat, factor_S, rate_S)

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """The local rate of each tensor that adapts."""
        norms_3S, tables = sums.norms, sums.tables
        weight_S, grad_S = norms_3S[Quantity.WEIGHT], norms_3S[Quantity.GRADIENT]
        decay_S = tables.decay_S * group["weight_decay"]
        ratio_S = group["trust_coeff"] * weight_S / (grad_S + decay_S * weight_S + group["eps"])
        if group["trust_clip"] is not None:
            ratio_S = ratio_S.clamp(*group["trust_clip"])
        adapt_S = tables.adapt_S | group["always_adapt"]
        ratio_S = torch.where((weight_S > 0) & (grad_S > 0) & adapt_S, ratio_S, 1.0)
        return StepFactors(ratio_S, adapt_S)

    @classmethod
    def bytes_moved(cls) -> int:
        """Two passes: w g read; then w g m read, w m written (see `kernels`)."""
        return 28

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed bounds LAMB's ratio by `min_coeff` and `max_coeff`; so can this one be."""
        return translate_coefficients(params)
