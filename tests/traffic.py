"""Log the collectives of this process: operation, dtype and elements of each call."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_OPERATIONS = (
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
    "all_gather",
    "all_to_all_single",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
)


class Call(NamedTuple):
    """One call of a collective, measured by the larger of its sides."""

    operation: str
    dtype: str
    elements: int
    payload: int
    """bytes"""


Traffic = dict[str, tuple[int, int]]
"""operation -> (calls, elements of the largest tensor of each call)"""


def log_collectives() -> Callable[[], list[Call]]:
    """Log from now on, in this process; the function returned gives the calls and clears them.

    Call it before the first engine starts: DeepSpeed keeps references to some of the functions.
    """
    log: list[Call] = []

    def logging(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            sides = [_tensors(value) for value in (*args, *kwargs.values())]
            larger = max(sides, key=lambda side: sum(x.numel() for x in side))
            log.append(
                Call(
                    name,
                    str(larger[0].dtype).removeprefix("torch."),
                    sum(x.numel() for x in larger),
                    sum(x.numel() * x.element_size() for x in larger),
                )
            )
            return original(*args, **kwargs)

        return call

    for name in _OPERATIONS:
        setattr(dist, name, logging(name, getattr(dist, name)))

    def take() -> list[Call]:
        taken = list(log)
        log.clear()
        return taken

    return take


def _tensors(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, list | tuple):
        return [x for x in value if torch.is_tensor(x)]
    return []


def count_collectives() -> Callable[[], Traffic]:
    """The same as counts by operation."""
    take_calls = log_collectives()

    def take() -> Traffic:
        traffic: Traffic = {}
        for operation, _, elements, _ in take_calls():
            calls, sum_ = traffic.get(operation, (0, 0))
            traffic[operation] = (calls + 1, sum_ + elements)
        return traffic

    return take
