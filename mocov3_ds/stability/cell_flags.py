"""Which flags of train.py do the settings of a cell mean?

A setting is a flag of train.py (`epochs`, `model.dim`, `views.fixed`) or one of the words that
spare the optimizer block of the DeepSpeed JSON: a parameter of the optimizer (`lr`, `weight_decay`,
`update_clip`, ...), or

    optimizer           type of the optimizer
    beta1, beta2        decay of the first and the second moment
    sgd_momentum        momentum of LARS
    patch               patch projection: trained, frozen, or its rate relative to the others
    warmup              warm-up as a share of the epochs
    qk_norm             normalise queries and keys of the attention
    gradient_clipping   DeepSpeed's bound of the global gradient norm
    clip                gradient clip by history, "adagc" or "zclip", or a table with its numbers
    layer_scale         first value of LayerScale
    sigma_reparam       sigma-reparametrisation
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mocov3_ds.config.run_config import Config
from mocov3_ds.optim.build import all_params
from mocov3_ds.recipes import RECIPES

_OF_MODEL = ("qk_norm", "layer_scale", "sigma_reparam")
"""words that are flags of the model"""
Overrides = Mapping[str, Any]
"""settings of a cell by name, values as the TOML file gives them"""

WORDS = ("optimizer", "patch", "warmup", *_OF_MODEL, "gradient_clipping", "clip")
_SPELLINGS = {"beta1": "betas", "beta2": "betas", "sgd_momentum": "momentum"}
"""word of a grid -> the optimizer's parameter that it sets, where the two differ"""
_REPEATED = ("model.group_lr",)
"""flags that are given once for each of their values"""


def optimizer_words() -> list[str]:
    """Words of a grid that go into the optimizer block."""
    replaced = {*_SPELLINGS.values(), "backend"}
    return [*(name for name in all_params() if name not in replaced), *_SPELLINGS]


def patch_rate(settings: Overrides) -> float:
    """Rate of the patch projection relative to the others; 0 = frozen."""
    value = settings.get("patch", "trained")
    return {"trained": 1.0, "frozen": 0.0}[value] if isinstance(value, str) else float(value)


def settings_flags(settings: Overrides) -> list[str]:
    """All settings of a cell as flags of train.py.

    The optimizer block is given complete, so that nothing of the recipe's is left in it.
    """
    remaining = dict(settings)
    recipe = remaining.pop("recipe", "tiny")
    block = _pop_optimizer_block(remaining, recipe)
    flags = ["--recipe", recipe, "--ds", f"optimizer={json.dumps(block)}"]
    if "gradient_clipping" in remaining:
        flags += ["--ds", f"gradient_clipping={remaining.pop('gradient_clipping')}"]
    backbone = remaining.get("model.backbone", RECIPES[recipe].config.model.backbone)
    if backbone == "vit" or patch_rate(remaining) != 1:  # others refuse it, as they have none
        flags += ["--model.patch_lr", f"{patch_rate(remaining):g}"]
    remaining.pop("patch", None)
    for word in _OF_MODEL:
        if word in remaining:
            remaining[f"model.{word}"] = remaining.pop(word)
    if "warmup" in remaining:
        epochs = remaining.get("epochs", RECIPES[recipe].config.epochs)
        remaining["warmup_epochs"] = remaining.pop("warmup") * epochs
    for key, value in remaining.items():
        flags += config_flag(key, value)
    return flags


def _pop_optimizer_block(settings: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Take the optimizer's words out of `settings`; the recipe gives the others, if it fits."""
    default = RECIPES[recipe].engine["optimizer"]
    kind = settings.pop("optimizer", default["type"])
    values = {word: settings.pop(word) for word in optimizer_words() if word in settings}
    params = {"lr": default["params"]["lr"]}
    if kind.lower() == default["type"].lower():
        params = dict(default["params"])
    if {"beta1", "beta2"} & {*values}:
        beta1, beta2 = params.get("betas", (0.9, 0.999))
        params["betas"] = [values.pop("beta1", beta1), values.pop("beta2", beta2)]
    if "sgd_momentum" in values:
        params["momentum"] = values.pop("sgd_momentum")
    clip = {"clip": settings.pop("clip")} if "clip" in settings else {}
    return {"type": kind, "params": {**params, **values}, **clip}


def config_flag(key: str, value: Any) -> list[str]:
    """One field of `Config` as flags; `key` is FIELD or GROUP.FIELD."""
    if isinstance(value, bool):
        group, _, name = key.rpartition(".")
        switch = name if value else f"no-{name}"
        return [f"--{group}.{switch}" if group else f"--{switch}"]
    if key in _REPEATED:
        return [word for one in value for word in (f"--{key}", str(one))]
    if isinstance(value, list | tuple):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", str(value)]


def flatten_config(config: Config) -> Iterator[tuple[str, Any]]:
    """Every field of a config as `GROUP.FIELD` or `FIELD`, with its value."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            for leaf in dataclasses.fields(value):
                yield f"{entry.name}.{leaf.name}", getattr(value, leaf.name)
        else:
            yield entry.name, value
