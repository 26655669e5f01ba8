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
    refuse_keywords,
    translate_coefficients,
)
from mocov3_ds.optim.kernel_types import FlatStep
from mocov3_ds.optim.rules import RuleFor, by_dimensions, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.signals import StepFactors, StepSums


class Lars(ShardedOptimizer):
    """LARS that equals the unsharded optimizer on any world size.

    With m the momentum and w a tensor of the model, as a whole,

        ratio = clip(trust_coeff |w| / (|g| + weight_decay |w| + eps))   (1 where |w| or |g| is 0)
        m <- momentum m + ratio (g + weight_decay w)
        w <- w - lr m

    With `moco_v3` it is the LARS of the published MoCo v3 code (facebookresearch/moco-v3), whose
    ratio is that of the direction, without eps, and whose class token is treated as a matrix:

        ratio = clip(trust_coeff |w| / |g + weight_decay w|)            (1 where either is 0)

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
        moco_v3: Whether the ratio's denominator is |g + weight_decay w|, and all tensors of two
            dimensions or more decay and adapt, tokens and tables too, whatever the rule says.
        rule: Function of a tensor's name and full shape that gives its `Rule`. By default biases,
            norms, tokens and tables of positions neither decay nor adapt.
        backend: Which kernels do the arithmetic; see `kernels`.
        unknown: Anything else is refused, with what to use instead.

    Raises:
        ValueError: An impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    hints: ClassVar[Mapping[str, str]] = {
        "update_clip": "the trust ratio sets the length of the step; use trust_clip, or AdamW"
    }
    has_trust_ratio: ClassVar[bool] = True
    later_options: ClassVar[tuple[str, ...]] = ("moco_v3",)
    rule_options: ClassVar[tuple[str, ...]] = ("moco_v3",)

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
        moco_v3: bool = False,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        refuse_keywords(type(self), unknown)
        defaults = {
            "lr": check_number("lr", lr, 0),
            "momentum": check_number("momentum", momentum, 0, 1),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "trust_coeff": check_number("trust_coeff", trust_coeff, 0),
            "eps": check_number("eps", eps, 0),
            "nesterov": check_switch("nesterov", nesterov),
            "trust_clip": check_trust_clip(trust_clip),
            "always_adapt": check_switch("always_adapt", always_adapt),
            "moco_v3": check_switch("moco_v3", moco_v3),
        }
        rule = by_dimensions(rule) if moco_v3 else rule
        super().__init__(named_parameters, defaults, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """Measure the norms; the momentum waits for the ratio."""
        flat.kernels.measure_lars(flat, sums_QS)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Update the momentum and move the weights."""
        flat.kernels.move_lars(flat, factor_S, rate_S)

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """The local rate of each tensor that adapts."""
        tables = sums.tables
        weight_S, update_S, grad_S = sums.norms
        length_S = update_S if group["moco_v3"] else grad_S
        if group["moco_v3"]:
            ratio_S = group["trust_coeff"] * weight_S / length_S
        else:
            decay_S = tables.decay_S * group["weight_decay"]
            ratio_S = group["trust_coeff"] * weight_S / (grad_S + decay_S * weight_S + group["eps"])
        if group["trust_clip"] is not None:
            ratio_S = ratio_S.clamp(*group["trust_clip"])
        adapt_S = tables.adapt_S | group["always_adapt"]
        ratio_S = torch.where((weight_S > 0) & (length_S > 0) & adapt_S, ratio_S, 1.0)
        return StepFactors(ratio_S, adapt_S)

    @classmethod
    def bytes_moved(cls) -> int:
        """Two passes: w g read; then w g m read, w m written (see `kernels`)."""
        return 28

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed bounds LAMB's ratio by `min_coeff` and `max_coeff`; so can this one be."""
        return translate_coefficients(params)
