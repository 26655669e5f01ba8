"""From the optimizer block of a DeepSpeed JSON to one of our optimizers.

    "optimizer": {"type": "Lamb", "params": {"lr": 2e-3, "weight_decay": 1e-3}}

DeepSpeed compares types without regard for case, and so do we. Its "Adam" is AdamW unless
`adam_w_mode` is false; so is ours, and `adam_w_mode: false` is an error, as is everything else that
would be ignored. The params are the keywords of the optimizer's constructor.
Beside them may stand a "clip", see `gradient_clip`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from mocov3_ds.optim.adamw import AdamW
from mocov3_ds.optim.arguments import (
    INSTEAD,
    NamedParameters,
    check_number,
    list_keywords,
)
from mocov3_ds.optim.gradient_clip import Clipper, read_clip
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.lars import Lars
from mocov3_ds.optim.muon import Muon
from mocov3_ds.optim.rules import RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.settings.spelling import did_you_mean

OptimizerClass = TypeVar("OptimizerClass", bound=type[ShardedOptimizer])

_classes: dict[str, type[ShardedOptimizer]] = {}
"""lower-case type of a JSON -> class"""


def register_optimizer(optimizer_class: OptimizerClass) -> OptimizerClass:
    """Let JSONs name an optimizer by its class name and aliases; usable as a decorator."""
    for name in (optimizer_class.__name__, *optimizer_class.aliases):
        _classes[name.lower()] = optimizer_class
    return optimizer_class


for _class in (AdamW, Lamb, Lars, Muon):
    register_optimizer(_class)


def find_optimizer(kind: str) -> type[ShardedOptimizer] | None:
    """Class of a JSON's optimizer type in any spelling; None where there is none."""
    return _classes.get(kind.lower())


def list_types() -> str:
    """The registered types as text: "AdamW, Adam (as AdamW), Lamb"."""
    types = []
    for optimizer_class in dict.fromkeys(_classes.values()):
        name = optimizer_class.__name__
        types += [name, *(f"{alias} (as {name})" for alias in optimizer_class.aliases)]
    return ", ".join(types)


def list_params(optimizer_class: type[ShardedOptimizer]) -> tuple[str, ...]:
    """Keywords that a block's params may give: those of the constructor, without `rule`."""
    return tuple(name for name in list_keywords(optimizer_class) if name != "rule")


def all_params() -> tuple[str, ...]:
    """Keywords that the params of any registered optimizer may give, each once."""
    return tuple(dict.fromkeys(name for cls in _classes.values() for name in list_params(cls)))


def build_optimizer(
    block: Mapping[str, Any] | None, named_parameters: NamedParameters, rule: RuleFor = vit_rule
) -> ShardedOptimizer:
    """Make the optimizer that a DeepSpeed JSON's optimizer block asks for.

    Args:
        block: The block, {"type": ..., "params": {...}}.
        named_parameters: Names and tensors, as `model.named_parameters()` gives them.
        rule: Function of a tensor's name and full shape that gives its `Rule`.

    Raises:
        ValueError: No block, an unknown type or key, an impossible value.
    """
    optimizer_class, params = read_block(block)
    for key in params:
        if key not in list_params(optimizer_class):
            raise ValueError(_refusal(key, optimizer_class))
    optimizer = optimizer_class(named_parameters, rule=rule, **params)
    assert block is not None
    clip = read_clip(block.get("clip"))
    optimizer.clipper = None if clip is None else Clipper(clip)
    return optimizer


def check_block(block: Mapping[str, Any] | None) -> None:
    """Read an optimizer block as training does, on small tensors of each kind that a ViT has.

    Raises:
        ValueError: Training would refuse it whatever the network is.
    """
    base_rate(block)
    shapes = {
        "patch_embed.proj.weight": (2, 1, 1, 1),
        "attn.qkv.weight": (6, 2),
        "norm.weight": (2,),
        "last.weight": (2, 2),
    }
    tensors = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    build_optimizer(block, tensors, lambda name, shape: replace(vit_rule(name, shape), heads=1))


def base_rate(block: Mapping[str, Any] | None) -> float:
    """The `lr` of an optimizer block.

    Raises:
        ValueError: No block, an unknown type, or no usable `lr`.
    """
    _, params = read_block(block)
    if "lr" not in params:
        raise ValueError('the optimizer block has no params.lr; add e.g. "lr": 1.5e-4.')
    return check_number("optimizer.params.lr", params["lr"], 0)


def read_block(block: Mapping[str, Any] | None) -> tuple[type[ShardedOptimizer], dict[str, Any]]:
    """Class and params of an optimizer block, the params in the optimizer's own keywords.

    Raises:
        ValueError: No block, an unknown type, or params that contradict each other.
    """
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise ValueError(
            'the DeepSpeed config needs an optimizer block such as {"type": "AdamW", "params": '
            f'{{"lr": 1.5e-4}}}}; types are {list_types()}.'
        )
    for key in block:
        if key not in ("type", "params", "clip"):
            raise ValueError(
                f"the optimizer block has an unknown key {key!r}; known: type, params, clip."
            )
    optimizer_class = find_optimizer(block["type"])
    if optimizer_class is None:
        raise ValueError(f"optimizer type {block['type']!r} is unknown; types are {list_types()}.")
    params = block.get("params") or {}
    if not isinstance(params, Mapping):
        raise ValueError(f"the optimizer block's params are {params!r}, not an object.")
    return optimizer_class, optimizer_class.translate_params(dict(params))


def _refusal(key: str, optimizer_class: type[ShardedOptimizer]) -> str:
    hint = optimizer_class.hints.get(key) or INSTEAD.get(key)
    if hint:
        return f"the optimizer block's {key!r} has no effect here; {hint}."
    params = list_params(optimizer_class)
    return (
        f"optimizer {optimizer_class.__name__} has no parameter {key!r}"
        f"{did_you_mean(key, params)}; known: {', '.join(params)}."
    )
