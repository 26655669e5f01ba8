"""An engine's step with a limit: where the gradient is not finite or too large, it is dropped.

DeepSpeed drops a step whose global gradient norm is not finite, on all ranks alike and before its
optimizer has touched anything: the same path that fp16 takes after an overflow. `step_within` uses
that path for more: it hands over the norm, and drops the step as well where the norm is too large,
or where the caller knows already that the step is bad. No pass over the gradient and no collective
are added, except at stage 0 in fp32, where DeepSpeed computes no norm: there one pass is made.

Read from DeepSpeed 0.19: each wrapper (see `zero`) asks `is_invalid_grad_norm`, as a name of its
own module, right after the norm is known and before it acts on the answer.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mocov3_ds.distributed import ranks

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine  # DeepSpeed takes seconds to import

DROP = -math.inf
"""A limit that no norm passes."""


def step_within(engine: "Engine[nn.Module]", limit: float = math.inf) -> float:
    """`engine.step()`, but the weights stay where the gradient is not finite or above a limit.

    Whether they moved is `engine.was_step_applied()`. All ranks must call with the same limit.

    Args:
        engine: DeepSpeed engine whose backward has been called.
        limit: Largest norm of the whole gradient that is applied; `DROP` drops the step anyway.

    Returns:
        The norm over all ranks, before clipping; infinite or NaN where it is not finite.

    Raises:
        ValueError: The DeepSpeed config turns the norm off.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return _step_without_wrapper(engine, limit)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # dropped like any other; `scale_is_exhausted`
    check = _NormCheck(engine, limit)
    with _norm_checked(sys.modules[type(engine.optimizer).__module__], check):
        engine.step()
    if check.norm is None:
        if engine.was_step_applied():
            raise ValueError(
                "DeepSpeed computed no gradient norm, so nothing can be said of the step; remove "
                "zero_optimization.compute_grad_norm from its config."
            )
        return math.inf  # DeepSpeed met an overflow before it computed the norm
    return check.norm


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
    """Answer to DeepSpeed's first question of a step; its later ones are about other numbers."""

    def __init__(self, engine: "Engine[nn.Module]", limit: float) -> None:
        self._engine, self._limit = engine, limit
        self.norm: float | None = None

    def is_refused(self, scaled_norm: Any) -> bool:
        if self.norm is not None:
            return False
        norm = float(scaled_norm)
        # DeepSpeed's helpers say -1 for what is not finite
        loss_scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0) or 1.0)
        self.norm = norm / loss_scale if norm >= 0 else math.inf
        return _is_too_large(self.norm, self._limit)


def _is_too_large(norm: float, limit: float) -> bool:
    """One answer for all ranks, whose norms may differ in the last bit."""
    if limit in (math.inf, DROP):
        return limit == DROP
    exceeds = torch.tensor(int(norm > limit), device=ranks.this_device())
    return bool(ranks.all_reduce_max(exceeds))


@contextmanager
def _norm_checked(module: Any, check: _NormCheck) -> Iterator[None]:
    original = module.is_invalid_grad_norm
    module.is_invalid_grad_norm = lambda norm: check.is_refused(norm) or original(norm)
    try:
        yield
    finally:
        module.is_invalid_grad_norm = original


def _step_without_wrapper(engine: "Engine[nn.Module]", limit: float) -> float:
    """Stage 0, fp32: the engine steps our optimizer itself, with whole gradients on each rank."""
    optimizer = engine.optimizer
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = float(torch.stack(torch._foreach_norm(gradients)).norm()) if gradients else 0.0
    dropped = not math.isfinite(norm) or _is_too_large(norm, limit)
    optimizer.overflow = dropped  # the engine reads it to see whether the step was applied
    if dropped:
        optimizer.step = lambda: None
    try:
        engine.step()
    finally:
        if dropped:
            del optimizer.step
    return norm
