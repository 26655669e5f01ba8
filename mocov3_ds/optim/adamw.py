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

from mocov3_ds.optim.arguments import (
    NamedParameters,
    check_betas,
    check_number,
    check_switch,
    refuse_keywords,
)
from mocov3_ds.optim.kernel_types import NORMS, NORMS_AND_RMS, FlatStep
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.signals import StepFactors, StepSums


class AdamW(ShardedOptimizer):
    """AdamW that gives the same weights under any ZeRO stage, and measures each tensor.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: Learning rate of tensors whose rule has no multiplier.
        betas: Decay rates of the first and second moment.
        eps: Number that is added to the root of the second moment.
        weight_decay: Decoupled decay of the tensors whose rule decays.
        bias_correction: Whether the moments are corrected for starting at 0.
        update_clip: Whether each tensor's rate is divided by max(1, RMS of g / √v̂).
        rule: Function of a tensor's name and full shape that gives its `Rule`.
        backend: Which kernels do the arithmetic; see `kernels`.
        unknown: Anything else is refused, with what to use instead.

    Raises:
        ValueError: An impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    aliases: ClassVar[tuple[str, ...]] = ("Adam",)
    measures_rms: ClassVar[bool] = True
    accepts_update_clip: ClassVar[bool] = True

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
        **unknown: Any,
    ) -> None:
        refuse_keywords(type(self), unknown)
        defaults = {
            "lr": check_number("lr", lr, 0),
            "betas": check_betas(betas),
            "eps": check_number("eps", eps, 0),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "bias_correction": check_switch("bias_correction", bias_correction),
            "update_clip": check_switch("update_clip", update_clip),
        }
        if update_clip and check_betas(betas)[1] == 0:
            raise ValueError(
                "update_clip has no effect with betas[1] = 0: the second moment is the gradient's "
                "own square then and the RMS is 1; raise betas[1] or remove update_clip."
            )
        super().__init__(named_parameters, defaults, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """Update the moments; without `update_clip` no norm must be known, so the weights move."""
        flat.kernels.update_adam(flat, sums_QS, None if flat.group["update_clip"] else rate_S)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Move the weights, where the first pass has not done it."""
        if flat.group["update_clip"]:
            flat.kernels.move_weights(flat, rate_S * factor_S)

    def count_quantities(self, group: Mapping[str, Any]) -> int:
        """The update clip needs the RMS of g / √v̂ beside the norms."""
        return NORMS_AND_RMS if group["update_clip"] else NORMS

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """The update clip's factor for every tensor, or none."""
        if not group["update_clip"]:
            return super().compute_factors(sums, group)
        return StepFactors(1 / sums.rms.clamp_min(1.0), torch.ones_like(sums.tables.adapt_S))

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's "Adam" is AdamW unless `adam_w_mode` is false, which is refused."""
        if params.get("adam_w_mode", True) is not True:
            raise ValueError(
                "adam_w_mode must be true: Adam with L2 decay is not implemented; use AdamW."
            )
        return {key: value for key, value in params.items() if key != "adam_w_mode"}
