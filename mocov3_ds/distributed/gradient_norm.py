"""The norm of an engine's whole gradient in a few launches, at ZeRO stages 1 to 3.

DeepSpeed 0.19 looks in each tensor for values that are not finite, waits for the answer, and only
then computes the norm, again tensor by tensor: fifteen launches a tensor, which on one GPU was half
of all launches of a ViT-S step. But the norm of such a gradient is not finite, DeepSpeed drops a
step for that as well, on the same path, and one launch makes the norms of many tensors. So the
search always answers no, and the norm is computed here: in fp64, as DeepSpeed does, so that steps,
clipping and skips stay what they were.

Where the optimizer is offloaded, DeepSpeed measures each tensor on its way to the CPU: that stays.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks

_NORM_DTYPES = {
    "DeepSpeedZeroOptimizer": torch.float32,
    "DeepSpeedZeroOptimizer_Stage3": torch.float64,
}
"""Dtype in which each wrapper goes on with the norm"""


def speed_up_norm(wrapper: Any) -> None:
    """Let one of DeepSpeed's wrappers compute its gradient norm here; nothing for other ones.

    Args:
        wrapper: DeepSpeed's wrapper around the optimizer, `engine.optimizer`.
    """
    dtype = _NORM_DTYPES.get(type(wrapper).__name__)
    is_offloaded = getattr(wrapper, "cpu_offload", False) or getattr(
        wrapper, "offload_optimizer", False
    )
    if dtype is None or is_offloaded:
        return
    group = wrapper.dp_process_group  # not the wrapper, which would keep itself alive

    def norm_over_ranks(
        gradients: Sequence[Tensor], _parameters: object, _norm_type: float = 2
    ) -> Tensor:
        squares = ranks.all_reduce_sum(square_sum(gradients).to(dtype), group)
        return squares.sqrt()

    wrapper.get_grad_norm_direct = norm_over_ranks
    wrapper.has_overflow = lambda partition_gradients=True: False


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a scalar; fp64, in which no finite fp32 overflows.

    Args:
        tensors: Tensors of any float dtype on one device; none where a rank holds padding alone.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=ranks.this_device())
    norms = torch._foreach_norm(list(tensors), 2.0, torch.float64)
    return torch.stack(list(norms)).square().sum()
