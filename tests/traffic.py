"""Count the collectives of this process: calls and elements by operation."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

_OPERATIONS = (
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
    "all_gather",
    "broadcast",
    "reduce",
)

Traffic = dict[str, tuple[int, int]]
"""operation -> (calls, elements of the largest tensor of each call)"""


def count_collectives() -> Callable[[], Traffic]:
    """Count from now on, in this process; the function returned gives the counts and clears them.

    Call it before the first engine starts: DeepSpeed keeps references to some of the functions.
    """
    traffic: Traffic = {}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            sizes = [x.numel() for x in values if torch.is_tensor(x)]
            lists = [x for x in values if isinstance(x, list | tuple)]
            sizes += [sum(t.numel() for t in parts if torch.is_tensor(t)) for parts in lists]
            calls, elements = traffic.get(name, (0, 0))
            traffic[name] = (calls + 1, elements + max(sizes, default=0))
            return original(*args, **kwargs)

        return call

    for name in _OPERATIONS:
        setattr(dist, name, counting(name, getattr(dist, name)))

    def take() -> Traffic:
        taken = dict(traffic)
        traffic.clear()
        return taken

    return take
