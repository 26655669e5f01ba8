"""From the optimizer block of a DeepSpeed JSON to one of our optimizers.

    "optimizer": {"type": "Lamb", "params": {"lr": 2e-3, "weight_decay": 1e-3}}

DeepSpeed compares types without regard for case, and so do we. Its "Adam" is AdamW unless
`adam_w_mode` is false; so is ours, and `adam_w_mode: false` is an error, as is everything else that
would be ignored.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from mocov3_ds.optim.adamw import AdamW
from mocov3_ds.optim.arguments import NamedParameters, number
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.lars import Lars
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer

_ADAM_KEYS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "backend")
_ADAMW_KEYS = (*_ADAM_KEYS, "update_clip")
_TRUST_KEYS = ("trust_clip", "always_adapt", "min_coeff", "max_coeff")
_LAMB_KEYS = (*_ADAM_KEYS, *_TRUST_KEYS, "grad_averaging", "flat")
_LARS_KEYS = (
    *("lr", "momentum", "weight_decay", "trust_coeff", "eps", "nesterov", "backend"),
    *_TRUST_KEYS,
)
_KINDS: dict[str, tuple[type[ShardedOptimizer], tuple[str, ...]]] = {
    "adamw": (AdamW, _ADAMW_KEYS),
    "adam": (AdamW, _ADAMW_KEYS),
    "lamb": (Lamb, _LAMB_KEYS),
    "fusedlamb": (Lamb, _LAMB_KEYS),
    "lars": (Lars, _LARS_KEYS),
}
_TYPES = "AdamW, Adam (as AdamW), Lamb, FusedLamb (as Lamb), Lars"
_HINTS = {
    "max_grad_norm": "use the DeepSpeed config's gradient_clipping",
    "torch_adam": "there is one implementation; remove it",
    "amsgrad": "AMSGrad is not implemented; remove it",
    "update_clip": "the trust ratio sets the length of the step; use trust_clip, or AdamW",
    "eps_inside_sqrt": "eps is added outside the root; remove it",
}


def build_optimizer(
    block: Mapping[str, Any] | None, named_parameters: NamedParameters, rule: RuleFor = vit_rule
) -> ShardedOptimizer:
    """Make the optimizer that a DeepSpeed JSON's optimizer block asks for.

    Args:
        block: {"type": ..., "params": {...}}.
        named_parameters: `model.named_parameters()`.
        rule: (name, full shape) -> `Rule`.

    Raises:
        ValueError: no block, an unknown type or key, an impossible value.
    """
    kind, parameters = _read(block)
    optimizer_class, known = _KINDS[kind]
    for key in parameters:
        if key not in known:
            raise ValueError(_unknown_key(key, known, (block or {})["type"]))
    return optimizer_class(named_parameters, rule=rule, **_with_trust_clip(parameters))


def _with_trust_clip(parameters: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's `min_coeff` and `max_coeff` as our `trust_clip`."""
    bounds = {key: parameters.pop(key) for key in ("min_coeff", "max_coeff") if key in parameters}
    if bounds and "trust_clip" in parameters:
        raise ValueError(
            f"the optimizer block has trust_clip and {' and '.join(bounds)}; trust_clip is both, "
            "keep one of them."
        )
    if bounds:
        parameters["trust_clip"] = (
            bounds.get("min_coeff", 0.0),
            bounds.get("max_coeff", math.inf),
        )
    return parameters


def base_rate(block: Mapping[str, Any] | None) -> float:
    """The `lr` of an optimizer block.

    Raises:
        ValueError: no block, an unknown type, or no usable `lr`.
    """
    _, parameters = _read(block)
    if "lr" not in parameters:
        raise ValueError('the optimizer block has no params.lr; add e.g. "lr": 1.5e-4.')
    return number("optimizer.params.lr", parameters["lr"], 0)


def _read(block: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Lower-case type and the parameters that are left after DeepSpeed's `adam_w_mode`."""
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise ValueError(
            'the DeepSpeed config needs an optimizer block such as {"type": "AdamW", "params": '
            f'{{"lr": 1.5e-4}}}}; types are {_TYPES}.'
        )
    for key in block:
        if key not in ("type", "params"):
            raise ValueError(
                f"the optimizer block has an unknown key {key!r}; known: type, params."
            )
    kind = block["type"].lower()
    if kind not in _KINDS:
        raise ValueError(f"optimizer type {block['type']!r} is unknown; types are {_TYPES}.")
    given = block.get("params") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"the optimizer block's params are {given!r}, not an object.")
    parameters = dict(given)
    if kind in ("adam", "adamw") and parameters.pop("adam_w_mode", True) is not True:
        raise ValueError(
            "adam_w_mode must be true: Adam with L2 decay is not implemented; use AdamW."
        )
    return kind, parameters


def _unknown_key(key: str, known: tuple[str, ...], kind: str) -> str:
    if key in _HINTS:
        return f"the optimizer block's {key!r} has no effect here; {_HINTS[key]}."
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"optimizer {kind} has no parameter {key!r}; {hint}known: {', '.join(known)}."
