"""Any model of timm as a backbone: made by name, and refused where it would not be exact.

What a step draws must be a function of seed, step and sample, so dropout inside of a model is
refused; its stochastic depth is replaced (`stochastic_depth`).
"""

import ast
import json
import re
from typing import Any

import timm
from torch import nn

from mocov3_ds.model.shapes import TimmShape, write_size
from mocov3_ds.settings.spelling import did_you_mean

_OWNED = {
    "pretrained": "--init",
    "checkpoint_path": "--init",
    "pretrained_cfg": "--init",
    "pretrained_cfg_overlay": "--init",
    "cache_dir": "--init",
    "num_classes": "nothing: a backbone has no classifier",
    "features_only": "nothing: a backbone gives one row of features for an image",
    "in_chans": "--views.channels",
    "img_size": "--views.image_size",
    "drop_path_rate": "--model.drop_path",
    "scriptable": "nothing",
    "exportable": "nothing",
}
"""keywords of `timm.create_model` that are not the user's, and what is in their place"""


def build_timm(shape: TimmShape, drop_path: float = 0.0) -> nn.Module:
    """A model of timm without classifier and with random weights.

    Args:
        shape: name, size of the images and keywords.
        drop_path: stochastic depth rate of the last block.

    Raises:
        ValueError: there is no such model, it does not know a keyword, or it draws by itself.
    """
    if re.fullmatch(r"[\w.]+", shape.name) is None or not timm.is_model(shape.name):
        hint = did_you_mean(shape.name, timm.list_models())
        raise ValueError(
            f'timm has no model {shape.name!r}{hint}; `python -c "import timm; '
            "print(*timm.list_models('*resnet*'))\"` lists those of a kind."
        )
    keywords = read_keywords(shape.arguments)
    network = _create(shape, keywords, drop_path)
    _refuse_dropout(network, shape)
    return network


def read_keywords(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Keywords of a model from texts such as "embed_dim=192" or "depths=[2, 2]".

    Args:
        arguments: each KEY=VALUE, the value in JSON or as Python writes it, else taken as text.

    Raises:
        ValueError: a text has another form, a key is there twice, or it is another flag's.
    """
    keywords: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"--model.timm {argument!r} is not of the form key=value.")
        if key in keywords:
            raise ValueError(f"--model.timm {key} is there twice; keep one of them.")
        if key in _OWNED:
            raise ValueError(f"--model.timm {argument} is not for you to say; use {_OWNED[key]}.")
        keywords[key] = _read_value(text)
    return keywords


def _read_value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    return text


def _create(shape: TimmShape, keywords: dict[str, Any], drop_path: float) -> nn.Module:
    """The model with the size of its images and its stochastic depth told, where it knows these."""
    fixed: dict[str, Any] = {"num_classes": 0, "in_chans": shape.channels, **keywords}
    # 0, too: some models have a rate of their own where none is told
    optional: dict[str, Any] = {"img_size": shape.size, "drop_path_rate": drop_path}
    while True:
        try:
            network: nn.Module = timm.create_model(shape.name, **fixed, **optional)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument.*'(\w+)'", str(error))
            keyword = unknown[1] if unknown else ""
            if keyword in optional and (keyword == "img_size" or not drop_path):
                del optional[keyword]
                continue
            raise ValueError(f"timm:{shape.name} {_what_is_wrong(str(error))}.") from None
        except Exception as error:  # what a foreign network may raise has no bounds
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"timm:{shape.name} cannot be built for {shape.channels} channels of "
                f"{write_size(shape.size)} pixels with {keywords or 'no keywords'}: {reason}"
            ) from None
        return network


def _what_is_wrong(said: str) -> str:
    """What Python says of a keyword, in our words."""
    if unknown := re.search(r"unexpected keyword argument(?:\(s\): \[| )([^\]]+)", said):
        return f"knows no keyword {unknown[1]}"
    if fixed := re.search(r"multiple values for keyword argument '(\w+)'", said):
        return f"fixes {fixed[1]!r} by its name; choose another model, or leave it out"
    return f"cannot be built: {said}"


def _refuse_dropout(network: nn.Module, shape: TimmShape) -> None:
    for name, module in network.named_modules():
        kind = type(module).__name__
        keys = ("p", "prob", "drop_prob") if "Drop" in kind and kind != "DropPath" else ()
        rates = [getattr(module, key, 0.0) for key in (*keys, "drop_rate")]
        rate = max(rate for rate in rates if isinstance(rate, float | int))
        if rate > 0:
            raise ValueError(
                f"timm:{shape.name} has dropout ({kind} {name!r}, rate {rate:g}), whose draws "
                "would depend on ranks and chunks; switch it off by --model.timm (drop_rate=0 or "
                "the like); --model.drop_path is stochastic depth that is drawn for each sample."
            )
