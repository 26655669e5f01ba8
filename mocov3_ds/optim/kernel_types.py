"""What optimizers and kernels agree on: measured quantities, a flat in a step, the interface.

Legend: S = tensors that one call of `step` updates; Q = quantities measured of each: the first 3, 4
or all 8 of `Quantity`, so that nothing is computed that nobody asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor

from mocov3_ds.optim.step_tables import Share


class Quantity(IntEnum):
    """Rows of what the first pass measures; all but the last are sums over the elements."""

    WEIGHT = 0
    """squares of the weight"""
    UPDATE = 1
    """squares of the direction"""
    GRADIENT = 2
    """squares of the gradient"""
    AFTER = 3
    """squares of g / sqrt(v) with v after this step"""
    BEFORE = 4
    """the same with v before this step"""
    PRODUCT = 5
    """gradient times momentum before this step"""
    MOMENTUM = 6
    """squares of that momentum"""
    PEAK = 7
    """largest |gradient|"""


NORMS, NORMS_AND_RMS, EVERYTHING = 3, 4, 8  # values of Q

BACKENDS = ("auto", "plain", "blocks", "triton")
_SMALLEST_ROOT = 1e-15


@dataclass(frozen=True, eq=False)
class FlatStep:
    """One flat tensor in one step, as the two passes of an optimizer are given it.

    Attributes:
        share: Which tensors lie in the flat, with their rows and rules.
        kernels: Kernels for the device of the flat.
        weight: fp32 master weights, one-dimensional.
        gradient: Gradient of the same length, which the first pass may use as scratch space and
            the second pass finds as the first one left it.
        state: State tensors of the same length, in the order of `ShardedOptimizer.moments`.
        group: Hyper-parameters, as the constructor gave them.
        number: Optimizer steps done including this one, from 1.
    """

    share: Share
    kernels: "Kernels"
    weight: Tensor
    gradient: Tensor
    state: tuple[Tensor, ...]
    group: Mapping[str, Any]
    number: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight, gradient and state tensors, which all have the same length."""
        return self.weight, self.gradient, *self.state


class AdamTerms:
    """Scalars of one step of LAMB's or AdamW's direction m̂ / (√v̂ + eps) + weight_decay w.

    Args:
        group: Hyper-parameters of the optimizer; without `grad_averaging` it always averages.
        step: Optimizer steps done including this one, from 1.

    Attributes:
        gain: Weight of the gradient in the first moment.
        bias1: Divisor of the first moment.
        bias2: Divisor of the second moment.
        bias2_before: Divisor of the second moment before this step; 1 at the first step, where
            the moment is 0.
        floor: Smallest root of the second moment that a gradient is divided by, when measuring.
    """

    def __init__(self, group: Mapping[str, Any], step: int) -> None:
        self.beta1, self.beta2 = group["betas"]
        self.eps, self.weight_decay = group["eps"], group["weight_decay"]
        self.step, self.bias_correction = step, group["bias_correction"]
        self.grad_averaging = group.get("grad_averaging", True)
        self.gain = 1 - self.beta1 if self.grad_averaging else 1.0
        self.bias1 = self.bias2 = self.bias2_before = 1.0
        if self.bias_correction:
            self.bias1, self.bias2 = 1 - self.beta1**step, 1 - self.beta2**step
            self.bias2_before = 1 - self.beta2 ** (step - 1) or 1.0
        self.floor = max(self.eps, _SMALLEST_ROOT)


class Kernels(Protocol):
    """The two passes over one flat tensor; all tensors are one-dimensional fp32.

    Rows of S follow `Share.row`. w, g, m, v are weight, gradient, first and second moment.
    """

    def update_adam(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor | None) -> None:
        """Update m and v, and add to `sums_QS`.

        With `rate_S` None the direction is left in g; else w moves by `rate_S` times the direction
        at once, after which g is undefined.
        """

    def move_weights(self, flat: FlatStep, rate_S: Tensor) -> None:
        """Do w <- w - rate g, where g holds the direction."""

    def measure_lars(self, flat: FlatStep, sums_QS: Tensor) -> None:
        """Add to `sums_QS`; the direction is g + decay w."""

    def move_lars(self, flat: FlatStep, ratio_S: Tensor, rate_S: Tensor) -> None:
        """Do m <- momentum m + ratio direction, and w <- w - rate m.

        With `nesterov` the weights move by rate times (ratio direction + momentum m).
        """
