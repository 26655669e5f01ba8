"""An engine's step with a limit: where the gradient is not finite or too large, it is dropped.

DeepSpeed drops a step whose global gradient norm is not finite, on all ranks alike and before its
optimizer has touched anything: the same path that fp16 takes after an overflow. `step_within` uses
that path for more: it drops the step as well where the norm or the loss is too large. No pass over
the gradient is added, except at stage 0 in fp32, where DeepSpeed computes no norm: there one pass
is made. The host reads norm and loss together, which is the one time in a step that it waits for
the device.

Read from DeepSpeed 0.19: each wrapper (see `zero`) asks `is_invalid_grad_norm`, as a name of its
own module, right after the norm is known and before it acts on the answer.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine  # DeepSpeed takes seconds to import

DROP = -math.inf
"""A limit that no norm passes."""


class StepNumbers(NamedTuple):
    """What decided whether a step is made."""

    norm: float
    """of the gradient over all ranks, before clipping; infinite or NaN where it is not finite"""
    loss: float
    """mean over all ranks; 0 where none was given"""


def step_within(
    engine: "Engine[nn.Module]",
    limit: float = math.inf,
    *,
    loss_sum: Tensor | None = None,
    loss_limit: float = math.inf,
) -> StepNumbers:
    """`engine.step()`, but the weights stay where loss or gradient is not finite or above a limit.

    Whether they moved is `engine.was_step_applied()`. All ranks must call with the same limits.

    Args:
        engine: DeepSpeed engine whose backward has been called.
        limit: Largest norm of the whole gradient that is applied; `DROP` drops the step anyway.
        loss_sum: Sum of the loss over all ranks, a scalar; read here, together with the norm.
        loss_limit: Largest mean of the loss over the ranks whose step is applied.

    Raises:
        ValueError: The DeepSpeed config turns the norm off.
    """
    check = _NormCheck(engine, limit, loss_sum, loss_limit)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return _step_without_wrapper(engine, check)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # dropped like any other; `scale_is_exhausted`
    with _norm_checked(sys.modules[type(engine.optimizer).__module__], check):
        engine.step()
    if check.numbers is None:  # DeepSpeed met an overflow before it computed the norm
        if engine.was_step_applied():
            raise ValueError(
                "DeepSpeed computed no gradient norm, so nothing can be said of the step; remove "
                "zero_optimization.compute_grad_norm from its config."
            )
        check.is_refused(math.inf)
    assert check.numbers is not None
    return check.numbers


def scale_is_exhausted(engine: "Engine[nn.Module]") -> bool:
    """Whether an fp16 gradient that is not finite cannot be cured by a smaller loss scale.

    That is so for a scale that does not follow overflows, and for one that has reached its floor
    (fp16.min_loss_scale), where DeepSpeed by itself would end the run with a bare Exception. Ask
    before the step; False where nothing is scaled.
    """
    if not engine.fp16_enabled():
        return False
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return True
    assert scaler is not None
    is_patient = scaler.delayed_shift > 1 and scaler.cur_hysteresis > 1
    return bool(scaler.cur_scale <= scaler.min_scale) and not is_patient


class _NormCheck:
    """Answers whether a norm forbids the step; DeepSpeed's first question of a step counts."""

    def __init__(
        self,
        engine: "Engine[nn.Module]",
        limit: float,
        loss_sum: Tensor | None,
        loss_limit: float,
    ) -> None:
        self._engine, self._limit = engine, limit
        self._loss_sum, self._loss_limit = loss_sum, loss_limit
        self._asked_of: Any = None
        self._refuses = False
        self.numbers: StepNumbers | None = None

    def knows(self, scaled_norm: Any) -> bool:
        """Whether the answer is this check's to give: for the gradient's norm, and no other."""
        return self.numbers is None or scaled_norm is self._asked_of

    def is_refused(self, scaled_norm: Any) -> bool:
        """Whether the step of a gradient with this norm (times the loss scale) is dropped."""
        if self.numbers is None:
            self._asked_of = scaled_norm
            self._refuses = self._judge(scaled_norm)
        return self._refuses

    def _judge(self, scaled_norm: Any) -> bool:
        device = ranks.this_device() if self._loss_sum is None else self._loss_sum.device
        norm_of_rank = torch.as_tensor(scaled_norm, device=device).double()
        largest_norm = norm_of_rank
        if self._limit not in (math.inf, DROP):
            # one answer for all ranks, whose norms may differ in the last bit
            largest_norm = ranks.all_reduce_max(norm_of_rank.clone())
        loss_sum = torch.zeros_like(norm_of_rank) if self._loss_sum is None else self._loss_sum
        *norms, total = torch.stack([norm_of_rank, largest_norm, loss_sum.double()]).tolist()
        loss = total / ranks.world_size()
        # DeepSpeed's helpers say -1 for what is not finite
        loss_scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0) or 1.0)
        norm, largest = (value / loss_scale if value >= 0 else math.inf for value in norms)
        self.numbers = StepNumbers(norm, loss)
        is_bad_loss = not math.isfinite(loss) or loss > self._loss_limit
        return is_bad_loss or not math.isfinite(norm) or largest > self._limit


@contextmanager
def _norm_checked(module: Any, check: _NormCheck) -> Iterator[None]:
    original = module.is_invalid_grad_norm
    module.is_invalid_grad_norm = lambda norm: (
        check.is_refused(norm) if check.knows(norm) else original(norm)
    )
    try:
        yield
    finally:
        module.is_invalid_grad_norm = original


def _step_without_wrapper(engine: "Engine[nn.Module]", check: _NormCheck) -> StepNumbers:
    """Stage 0, fp32: the engine steps our optimizer itself, with whole gradients on each rank."""
    optimizer = engine.optimizer
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm() if gradients else 0.0
    dropped = check.is_refused(norm)
    optimizer.overflow = dropped  # the engine reads it to see whether the step was applied
    if dropped:
        optimizer.step = lambda: None
    try:
        engine.step()
    finally:
        if dropped:
            del optimizer.step
    assert check.numbers is not None
    return check.numbers
