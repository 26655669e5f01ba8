"""AdamW (arXiv 1711.05101) with per-tensor rules and signals, on whatever segments ZeRO gives.

Decay is decoupled in PyTorch's convention, w <- w - lr wd w - lr m̂ / (√v̂ + eps): at the same
hyper-parameters the weights are those of `torch.optim.AdamW`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mocov3_ds.optim.arguments import NamedParameters, number, pair_of_betas, switch
from mocov3_ds.optim.kernels import AdamTerms, Kernels
from mocov3_ds.optim.plan import Plan, Share
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer


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
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": number("lr", lr, 0),
            "betas": pair_of_betas(betas),
            "eps": number("eps", eps, 0),
            "weight_decay": number("weight_decay", weight_decay, 0),
            "bias_correction": switch("bias_correction", bias_correction),
        }
        super().__init__(named_parameters, defaults, rule, backend)

    def _sweep(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        sums_3S: Tensor,
        rate_S: Tensor,
    ) -> None:
        weight, m, v = self._views(share)
        terms = AdamTerms.of(group, self.state[share.flat.tensor]["step"])
        kernels.adam(share, weight, gradient, m, v, terms, sums_3S, rate_S)

    def _move(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        plan: Plan,
    ) -> None:
        """Nothing: no norm had to be known, so the first pass has moved the weights."""
