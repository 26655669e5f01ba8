"""Checks of a state dict before an optimizer takes it, so that another optimizer's is refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def check_state_dict(
    state_dict: Any,
    kind: str,
    options: Iterable[str],
    fixed: Mapping[str, Any],
    keys: Sequence[Sequence[str]],
    shapes: Sequence[Any],
) -> None:
    """Make sure that a state dict was written by an optimizer of the same kind.

    Args:
        state_dict: What the user gives to load_state_dict.
        kind: Name of the optimizer that is to take it.
        options: Hyper-parameters that the group must have.
        fixed: Those of the optimizer that loading cannot change; where the group has none, it is
            taken as equal.
        keys: State that each tensor of the group in order must have, once it has any.
        shapes: Shape of each tensor of the group in order; empty where they are not known.

    Raises:
        ValueError: It is none, or another optimizer's, one's with other options, or that of another
            model.
    """
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= {*state_dict}):
        raise ValueError(
            f"{kind}.load_state_dict needs what its state_dict() gave, a dict with state and "
            f"param_groups; it was given {_describe(state_dict)}."
        )
    for group in state_dict["param_groups"]:
        missing = [key for key in options if key not in group]
        if missing:
            raise ValueError(
                f"the state was written by another optimizer than {kind}: its group has no "
                f"{', '.join(missing)} (it has {', '.join(k for k in group if k != 'params')}). "
                f"Start {kind} afresh on the weights."
            )
        _check_fixed(group, kind, fixed)
    for index, state in state_dict["state"].items():
        needed = keys[index] if isinstance(index, int) and index < len(keys) else ()
        missing = [key for key in needed if key not in state] if state else []
        if missing:
            raise ValueError(
                f"the state was written by another optimizer than {kind}: tensor {index} has no "
                f"{', '.join(missing)} (it has {', '.join(map(str, state))}). Start {kind} afresh "
                "on the weights."
            )
        if state and isinstance(index, int) and index < len(shapes):
            _check_shapes({key: state[key] for key in needed}, index, shapes[index])


def _check_fixed(group: Mapping[str, Any], kind: str, fixed: Mapping[str, Any]) -> None:
    differing = [
        f"{key} {group[key]!r} and not {value!r}"
        for key, value in fixed.items()
        if group.get(key, value) != value
    ]
    if differing:
        raise ValueError(
            f"the state was written by a {kind} with {', '.join(differing)}, which decides how "
            "each tensor moves; build this one with the same options."
        )


def _check_shapes(state: Mapping[str, Any], index: int, shape: Any) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != shape:
            raise ValueError(
                f"the saved {key} of tensor {index} has shape {tuple(value.shape)}, the model's "
                f"tensor {tuple(shape)}; it is the state of another model."
            )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"one with {', '.join(map(repr, list(value)[:5])) or 'nothing'}"
    return f"a {type(value).__name__}"
