"""What optimizers and kernels agree on: measured quantities, scalars of a step, the interface.

Legend: S = tensors that one call of `step` updates; Q = quantities measured of each: the first 3, 4
or all 8 of the list below, so that nothing is computed that nobody asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mocov3_ds.optim.step_tables import Share

# Rows of what the first pass measures. Sums of squares of weight, direction and gradient; of
# g / sqrt(v) with v after and before this step; sum of gradient times momentum before this step;
# sum of squares of that momentum; and, the only one that is no sum, the largest |gradient|.
WEIGHT, UPDATE, GRADIENT, AFTER, BEFORE, PRODUCT, MOMENTUM, PEAK = range(8)
NORMS, NORMS_AND_RMS, EVERYTHING = 3, 4, 8  # values of Q

BACKENDS = ("auto", "plain", "blocks", "triton")
_SMALLEST_ROOT = 1e-15


@dataclass(frozen=True)
class AdamTerms:
    """Scalars of one step of LAMB's or AdamW's direction m̂ / (√v̂ + eps) + weight_decay w.

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        grad_averaging: Whether the gradient enters the first moment times 1 - beta1, or whole.
        eps: Number that is added to the root of the second moment.
        weight_decay: Decay of all tensors; the rule of a tensor multiplies it.
        step: Optimizer steps done including this one, from 1.
        bias_correction: Whether the moments are corrected for starting at 0.
    """

    beta1: float
    beta2: float
    grad_averaging: bool
    eps: float
    weight_decay: float
    step: int
    bias_correction: bool

    @classmethod
    def from_group(cls, group: Mapping[str, Any], step: int) -> "AdamTerms":
        """Scalars of a parameter group; a group without `grad_averaging` always averages."""
        return cls(
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            grad_averaging=group.get("grad_averaging", True),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            bias_correction=group["bias_correction"],
        )

    @property
    def gain(self) -> float:
        """Weight of the gradient in the first moment."""
        return 1 - self.beta1 if self.grad_averaging else 1.0

    @property
    def bias1(self) -> float:
        """Divisor of the first moment."""
        return 1 - self.beta1**self.step if self.bias_correction else 1.0

    @property
    def bias2(self) -> float:
        """Divisor of the second moment."""
        return 1 - self.beta2**self.step if self.bias_correction else 1.0

    @property
    def bias2_before(self) -> float:
        """Divisor of the second moment before this step; 1 at the first step, where it is 0."""
        divisor = 1 - self.beta2 ** (self.step - 1) if self.bias_correction else 1.0
        return divisor or 1.0

    @property
    def floor(self) -> float:
        """Smallest root of the second moment that a gradient is divided by, when measuring."""
        return max(self.eps, _SMALLEST_ROOT)


@dataclass(frozen=True)
class LarsTerms:
    """Scalars of one step of LARS.

    Attributes:
        momentum: Decay rate of the momentum.
        weight_decay: Decay of all tensors; the rule of a tensor multiplies it.
        nesterov: Whether the step looks one momentum step ahead.
    """

    momentum: float
    weight_decay: float
    nesterov: bool


class Kernels(Protocol):
    """The two passes over one flat tensor; all tensors are one-dimensional fp32.

    Rows of S follow `Share.row`. w, g, m, v are weight, gradient, first and second moment.
    """

    def update_adam(
        self,
        share: Share,
        w: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        terms: AdamTerms,
        sums_QS: Tensor,
        rate_S: Tensor | None,
    ) -> None:
        """Update m and v, and add to `sums_QS`.

        With `rate_S` None the direction is left in g; else w moves by `rate_S` times the direction
        at once, after which g is undefined.
        """

    def move_weights(self, share: Share, w: Tensor, u: Tensor, rate_S: Tensor) -> None:
        """Do w <- w - rate u."""

    def measure_lars(
        self, share: Share, w: Tensor, g: Tensor, m: Tensor, terms: LarsTerms, sums_QS: Tensor
    ) -> None:
        """Add to `sums_QS`; the direction is g + decay w."""

    def move_lars(
        self,
        share: Share,
        w: Tensor,
        g: Tensor,
        m: Tensor,
        terms: LarsTerms,
        ratio_S: Tensor,
        rate_S: Tensor,
    ) -> None:
        """Do m <- momentum m + ratio direction, and w <- w - rate m.

        With `nesterov` the weights move by rate times (ratio direction + momentum m).
        """
