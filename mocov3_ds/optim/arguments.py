"""Checks of what a user gives to an optimizer; each failure is one sentence with the remedy."""

import inspect
import math
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from mocov3_ds.distributed.segments import full_shape
from mocov3_ds.settings.spelling import did_you_mean

NamedParameters = Iterable[tuple[str, Tensor]]


def select_trained(named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The tensors to train, by name; frozen and empty ones are left out.

    Raises:
        ValueError: Tensors without names, a name or a tensor twice, complex tensors, or none.
    """
    trained: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for entry in named_parameters:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                "the optimizer needs names beside its tensors: give model.named_parameters(), not "
                "model.parameters() or parameter groups."
            )
        name, parameter = entry
        if name in trained:
            raise ValueError(f"two tensors are called {name!r}; names must be unique.")
        if twin := names.get(id(parameter)):
            raise ValueError(
                f"{twin!r} and {name!r} are one tensor, which would move twice; name it once."
            )
        names[id(parameter)] = name
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex; train its real view (torch.view_as_real).")
        if parameter.requires_grad and math.prod(full_shape(parameter)) > 0:
            trained[name] = parameter
    if not trained:
        raise ValueError("the optimizer was given no tensor that requires a gradient.")
    return trained


INSTEAD = {
    "max_grad_norm": "use the DeepSpeed config's gradient_clipping, or torch's clip_grad_norm_",
    "clip_grad_norm": "use the DeepSpeed config's gradient_clipping, or torch's clip_grad_norm_",
    "foreach": "give backend= (auto, plain, blocks, triton) instead; auto takes the fastest",
    "fused": "give backend= (auto, plain, blocks, triton) instead; auto takes the fastest",
    "capturable": "steps are not captured in CUDA graphs; remove it",
    "differentiable": "the step is not differentiable; remove it",
    "maximize": "the loss is minimised; negate it instead",
    "amsgrad": "AMSGrad is not implemented; remove it",
    "torch_adam": "there is one implementation; remove it",
    "adam_w_mode": "decay is decoupled always (AdamW); remove it",
    "eps_inside_sqrt": "eps is added outside the root; remove it",
    "use_nvlamb": "it is called always_adapt here",
    "set_grad_none": "zero_grad(set_to_none=...) decides that; remove it",
    "dampening": "the momentum is not dampened; remove it",
    "params": "give model.named_parameters() first; the tensors' names are needed",
    "decoupled_decay": "give AdamW instead, whose decay is decoupled",
    "caution": "cautious updates are not implemented; remove it",
    "beta1": "give betas=(first, second)",
    "beta2": "give betas=(first, second)",
}
"""Keywords that other libraries' optimizers have -> what to do instead"""


def refuse_keywords(optimizer_class: type, unknown: Iterable[str]) -> None:
    """Say of a constructor's unknown keywords what to use instead.

    Args:
        optimizer_class: The optimizer; its `hints` come before those that hold for all.
        unknown: Keywords that the constructor has not.

    Raises:
        ValueError: There is one.
    """
    for keyword in unknown:
        raise ValueError(f"{optimizer_class.__name__} {explain_keyword(optimizer_class, keyword)}")


def explain_keyword(optimizer_class: type, keyword: str) -> str:
    """What is to be said of a keyword that an optimizer has not."""
    hint = getattr(optimizer_class, "hints", {}).get(keyword) or INSTEAD.get(keyword)
    keywords = list_keywords(optimizer_class)
    if hint:
        return f"has no {keyword!r}; {hint}."
    return f"has no {keyword!r}{did_you_mean(keyword, keywords)}; known: {', '.join(keywords)}."


def list_keywords(optimizer_class: type) -> tuple[str, ...]:
    """Names of the keywords of an optimizer's constructor, `rule` and `backend` among them."""
    parameters = inspect.signature(optimizer_class).parameters.values()
    return tuple(
        p.name for p in parameters if p.name != "named_parameters" and p.kind != p.VAR_KEYWORD
    )


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """Return `value` as a float, if it is a number within [low, high).

    Raises:
        ValueError: It is no number, or outside.
    """
    if isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a tensor; it must be a number, as the kernels read it on the host. Give "
            f"{name}.item(), and change the rate between steps with set_lr or a scheduler."
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be a number.")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(
            f"{name} is a number of more than 300 digits; it must be at least {low} and below "
            f"{high}."
        ) from None
    if not low <= number < high:
        raise ValueError(f"{name} is {value}; it must be at least {low} and below {high}.")
    return number


def check_switch(name: str, value: Any) -> bool:
    """Return `value`, if it is true or false.

    Raises:
        ValueError: It is something else (a JSON string "false" would otherwise count as true).
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value`, if it is one of the choices.

    Args:
        name: Name of the option, for the message.
        value: What the user gave.
        choices: What may be given.

    Raises:
        ValueError: It is something else.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
    return str(value)


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return `value`, if it is a whole number within [low, high].

    Raises:
        ValueError: It is no whole number, or outside.
    """
    number = check_number(name, value, low, high + 1)
    if number != int(number):
        raise ValueError(f"{name} is {value}; it must be a whole number.")
    return int(number)


def check_betas(betas: Any) -> tuple[float, float]:
    """Return the decay rates of the moments, if each is within [0, 1).

    Raises:
        ValueError: Not two numbers, or outside.
    """
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; it must be two numbers, e.g. [0.9, 0.999].")
    return check_number("betas[0]", betas[0], 0, 1), check_number("betas[1]", betas[1], 0, 1)


def check_trust_clip(trust_clip: Any) -> tuple[float, float] | None:
    """Return the smallest and largest trust ratio, or None for no bounds.

    Raises:
        ValueError: Not two numbers, negative, or the wrong way round.
    """
    if trust_clip is None:
        return None
    if not isinstance(trust_clip, list | tuple) or len(trust_clip) != 2:
        raise ValueError(
            f"trust_clip is {trust_clip!r}; it must be null or the smallest and the largest "
            "trust ratio, e.g. [0.01, 10]."
        )
    low = check_number("trust_clip[0]", trust_clip[0], 0)
    infinite = trust_clip[1] == math.inf
    high = math.inf if infinite else check_number("trust_clip[1]", trust_clip[1], 0)
    if low > high:
        raise ValueError(f"trust_clip is {trust_clip!r}; its first number must not be larger.")
    return low, high


def translate_coefficients(params: dict[str, Any]) -> dict[str, Any]:
    """Replace DeepSpeed's `min_coeff` and `max_coeff` by `trust_clip`.

    Args:
        params: Params of an optimizer block, as a JSON gives them.

    Raises:
        ValueError: Both spellings are given.
    """
    bounds = {key: params[key] for key in ("min_coeff", "max_coeff") if key in params}
    if not bounds:
        return params
    if "trust_clip" in params:
        raise ValueError(
            f"the optimizer block has trust_clip and {' and '.join(bounds)}; trust_clip is both, "
            "keep one of them."
        )
    clip = (bounds.get("min_coeff", 0.0), bounds.get("max_coeff", math.inf))
    return {key: params[key] for key in params if key not in bounds} | {"trust_clip": clip}
