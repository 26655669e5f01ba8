"""LAMB (arXiv 1904.00962) whose trust ratios are per tensor under every ZeRO stage."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.arguments import (
    NamedParameters,
    check_betas,
    check_number,
    check_switch,
    check_trust_clip,
    refuse_keywords,
    translate_coefficients,
)
from mocov3_ds.optim.kernel_types import NORMS, FlatStep, Quantity
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.signals import StepFactors, StepSums


class Lamb(ShardedOptimizer):
    """LAMB that equals the unsharded optimizer on any world size.

    With m and v the moments of the gradient and w a tensor of the model, as a whole,

        u = m̂ / (√v̂ + eps) + weight_decay w
        w <- w - lr clip(|w| / |u|) u          (the ratio is 1 where |w| or |u| is 0)

    The gradient is taken as it is given: clip it with DeepSpeed's `gradient_clipping`.

    Args:
        named_parameters: `model.named_parameters()`; frozen tensors are left out.
        lr: Learning rate of tensors whose rule has no multiplier.
        betas: Decay rates of the first and second moment.
        eps: Number that is added to the root of the second moment.
        weight_decay: Decay inside the adapted direction, for tensors whose rule decays.
        bias_correction: Whether the moments are corrected for starting at 0, before the ratio.
        grad_averaging: Whether the gradient enters the first moment times 1 - betas[0], or whole.
        trust_clip: Smallest and largest trust ratio; no bounds by default.
        always_adapt: Whether every tensor has a trust ratio, whatever its rule says.
        flat: What LAMB is under DeepSpeed's own handling: one ratio over all adapted elements of
            each flat tensor of this rank, so another algorithm on each number of ranks. It exists
            to be compared with.
        rule: Function of a tensor's name and full shape that gives its `Rule`. By default biases,
            norms, tokens and tables of positions neither decay nor adapt.
        backend: Which kernels do the arithmetic; see `kernels`.
        unknown: Anything else is refused, with what to use instead.

    Raises:
        ValueError: An impossible value, or tensors it cannot train.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    aliases: ClassVar[tuple[str, ...]] = ("FusedLamb",)
    hints: ClassVar[Mapping[str, str]] = {
        "update_clip": "the trust ratio sets the length of the step; use trust_clip, or AdamW"
    }
    has_trust_ratio: ClassVar[bool] = True
    measures_rms: ClassVar[bool] = True
    counts_own_updates: ClassVar[bool] = (
        False  # as timm and apex; torch's Adam counts each tensor's
    )

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
        **unknown: Any,
    ) -> None:
        refuse_keywords(type(self), unknown)
        defaults = {
            "lr": check_number("lr", lr, 0),
            "betas": check_betas(betas),
            "eps": check_number("eps", eps, 0),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "bias_correction": check_switch("bias_correction", bias_correction),
            "grad_averaging": check_switch("grad_averaging", grad_averaging),
            "trust_clip": check_trust_clip(trust_clip),
            "always_adapt": check_switch("always_adapt", always_adapt),
            "flat": check_switch("flat", flat),
        }
        super().__init__(named_parameters, defaults, rule, backend)

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """Update the moments and leave the direction in the gradient's place."""
        flat.kernels.update_adam(flat, sums_QS, None)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Move the weights along the direction."""
        flat.kernels.move_weights(flat, rate_S * factor_S)

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """The trust ratio of each tensor that adapts."""
        adapt_S = sums.tables.adapt_S | group["always_adapt"]
        norms_3S = _flat_norms(sums, adapt_S) if group["flat"] else sums.norms
        weight_S, update_S = norms_3S[Quantity.WEIGHT], norms_3S[Quantity.UPDATE]
        ratio_S = trust_ratio(weight_S, update_S, adapt_S, group["trust_clip"])
        return StepFactors(ratio_S, adapt_S)

    @classmethod
    def bytes_moved(cls) -> int:
        """Two passes: w g m v read, m v u written; then w u read, w written (see `kernels`)."""
        return 40

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed bounds the ratio by `min_coeff` and `max_coeff`."""
        return translate_coefficients(params)


def trust_ratio(
    weight_S: Tensor, update_S: Tensor, adapt_S: Tensor, clip: tuple[float, float] | None
) -> Tensor:
    """|w| / |u| within `clip` where a tensor adapts and both norms are above 0, else 1; (S,)."""
    ratio_S = weight_S / update_S
    if clip is not None:
        ratio_S = ratio_S.clamp(*clip)
    return torch.where((weight_S > 0) & (update_S > 0) & adapt_S, ratio_S, 1.0)


def _flat_norms(sums: StepSums, adapt_S: Tensor) -> Tensor:
    """Norms over a flat's adapted elements on this rank, for each of its tensors; (3, S)."""
    sums_3S = torch.where(adapt_S, sums.local_QS[:NORMS], 0.0)
    for share in sums.tables.shares:
        sums_3S[:, share.rows] = sums_3S[:, share.rows].sum(dim=1, keepdim=True)
    return sums_3S.sqrt()
