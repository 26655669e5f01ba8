"""Checks of what a user gives to an optimizer; each failure is one sentence with the remedy."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

NamedParameters = Iterable[tuple[str, Tensor]]


def trained_tensors(named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The tensors to train, by name; frozen and empty ones are left out.

    Raises:
        ValueError: tensors without names, a name given twice, complex tensors, nothing to train.
    """
    trained: dict[str, Tensor] = {}
    for entry in named_parameters:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                "the optimizer needs names beside its tensors: give model.named_parameters(), not "
                "model.parameters() or parameter groups."
            )
        name, parameter = entry
        if name in trained:
            raise ValueError(f"two tensors are called {name!r}; names must be unique.")
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex; train its real view (torch.view_as_real).")
        if parameter.requires_grad and math.prod(full_shape(parameter)) > 0:
            trained[name] = parameter
    if not trained:
        raise ValueError("the optimizer was given no tensor that requires a gradient.")
    return trained


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, also where `deepspeed.zero.Init` has already cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """`value` as a float within [low, high).

    Raises:
        ValueError: it is no number, or outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; it must be at least {low} and below {high}.")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """`value` as it is, if it is true or false.

    Raises:
        ValueError: it is something else (a JSON string "false" would otherwise count as true).
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
    return value


def pair_of_betas(betas: Any) -> tuple[float, float]:
    """Decay rates of the moments, each within [0, 1).

    Raises:
        ValueError: not two numbers, or outside.
    """
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; it must be two numbers, e.g. [0.9, 0.999].")
    return number("betas[0]", betas[0], 0, 1), number("betas[1]", betas[1], 0, 1)


def trust_bounds(trust_clip: Any) -> tuple[float, float] | None:
    """Smallest and largest trust ratio, or None for no bounds.

    Raises:
        ValueError: not two numbers, negative, or the wrong way round.
    """
    if trust_clip is None:
        return None
    if not isinstance(trust_clip, list | tuple) or len(trust_clip) != 2:
        raise ValueError(
            f"trust_clip is {trust_clip!r}; it must be null or the smallest and the largest "
            "trust ratio, e.g. [0.01, 10]."
        )
    low = number("trust_clip[0]", trust_clip[0], 0)
    high = math.inf if trust_clip[1] == math.inf else number("trust_clip[1]", trust_clip[1], 0)
    if low > high:
        raise ValueError(f"trust_clip is {trust_clip!r}; its first number must not be larger.")
    return low, high
