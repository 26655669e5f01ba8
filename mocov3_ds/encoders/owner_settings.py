"""What do the settings that lie beside weights say about the function that they are part of?

Two networks of the same tensors differ in the number of heads, the activation, the epsilon of the
norms, where the norms stand and what is called the features. The weights do not tell; a config.json
of transformers or timm does, and so do the options that some programs save with the weights.
Everything found there is obeyed, or refused where the plain Vision Transformer cannot obey it.
"""

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.encoders.torch_file import StandIn
from mocov3_ds.model.vit import VitShape
from mocov3_ds.recipes import read_json

_log = logging.getLogger("mocov3_ds")

Colour = tuple[float, ...]
"""a number for each channel of an image"""

_PLAIN_TRANSFORMERS = ("vit", "vit_mae", "vit_msn")
"""model types of transformers whose encoder is this one"""
_GELU = ("gelu", "gelu_python")
TRANSFORMERS_EPS = 1e-12
"""epsilon of the norms of transformers' ViT where nothing tells another one"""
_TRANSFORMERS_DEFAULTS = {"hidden_act": "gelu", "qkv_bias": True}
_SIZES = {  # names in a config.json of transformers, and of the shape
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
}
_DINO_HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
_MOCO_V3_HEADS = {"vit_small": 12, "vit_base": 12, "vit_large": 16, "vit_huge": 16}


@dataclass(frozen=True, kw_only=True)
class OwnerSettings:
    """What is known of a network besides its tensors."""

    source: str = ""
    """what says so, in words for people; empty = nothing was found"""
    heads: int = 0
    """attention heads; 0 = not told"""
    norm_eps: float = 1e-6
    """epsilon of the norms"""
    qkv_bias: bool = True
    """whether queries, keys and values have biases"""
    sizes: Mapping[str, int] | None = None
    """fields of the shape that are told; they must be those of the tensors"""
    mean: Colour = ViewSpec.mean
    """what is subtracted from pixels in [0, 1]"""
    std: Colour = ViewSpec.std
    """what they are divided by after that"""

    def contradiction_of(self, shape: VitShape) -> str:
        """What is told otherwise than the tensors are, in words; empty = nothing."""
        for name, expected in (self.sizes or {}).items():
            if expected != getattr(shape, name):
                return f"{self.source} says {name} {expected}, the weights {getattr(shape, name)}"
        return ""


# ----------------------------------------------------------------------------------- folders


def read_settings_beside(folder: Path | None) -> OwnerSettings:
    """Settings in the config.json and preprocessor_config.json of a folder with weights.

    Args:
        folder: folder of the weights; None, or one without such files: nothing is known.

    Raises:
        ValueError: a file that is no JSON, or a setting that cannot be obeyed.
    """
    settings = OwnerSettings()
    if folder is None:
        return settings
    if (folder / "config.json").is_file():
        tree = read_json(folder / "config.json")
        if "architecture" in tree:
            settings = _read_timm(tree)
        elif tree.keys() & {"model_type", "num_attention_heads", "hidden_act", "layer_norm_eps"}:
            settings = _read_transformers(tree)
    if (folder / "preprocessor_config.json").is_file():
        tree = read_json(folder / "preprocessor_config.json")
        source = "preprocessor_config.json"
        if tree.get("do_normalize", True) is True:
            settings = replace(
                settings,
                mean=_read_colour(tree.get("image_mean", settings.mean), source, "image_mean"),
                std=_read_colour(tree.get("image_std", settings.std), source, "image_std"),
            )
        else:
            settings = replace(settings, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return settings


def _read_transformers(tree: Mapping[str, Any]) -> OwnerSettings:
    kind = tree.get("model_type", "vit")
    if kind not in _PLAIN_TRANSFORMERS:
        raise ValueError(
            f"config.json says model_type {kind!r}, whose forward pass is another one; known are "
            f"{', '.join(_PLAIN_TRANSFORMERS)}."
        )
    eps = 1e-6 if kind == "vit_msn" else TRANSFORMERS_EPS
    values = {"layer_norm_eps": eps, **_TRANSFORMERS_DEFAULTS, **tree}
    if values["hidden_act"] not in _GELU:
        raise ValueError(
            f"config.json says hidden_act {values['hidden_act']!r}; the network here has exact "
            "gelu alone, so its features would be others."
        )
    eps, bias = values["layer_norm_eps"], values["qkv_bias"]
    if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 < eps < 1:
        raise ValueError(f"config.json says layer_norm_eps {eps!r}; a number in (0, 1) it must be.")
    if not isinstance(bias, bool):
        raise ValueError(f"config.json says qkv_bias {bias!r}; true or false it must be.")
    sizes = {field: tree[name] for name, field in _SIZES.items() if name in tree}
    heads = tree.get("num_attention_heads", 0)
    for name, value in {**sizes, "num_attention_heads": heads}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (name in tree):
            raise ValueError(f"config.json says {name} {value!r}, which is no number of them.")
    return OwnerSettings(
        source="config.json", heads=heads, norm_eps=float(eps), qkv_bias=bias, sizes=sizes
    )


def _read_timm(tree: Mapping[str, Any]) -> OwnerSettings:
    arguments = tree.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"config.json says model_args {arguments!r}, which is no object.")
    if tree.get("global_pool") is not None:
        arguments = {"global_pool": tree["global_pool"], **arguments}
    settings = inspect_timm(tree["architecture"], arguments, "config.json")
    picture = tree.get("pretrained_cfg", tree)
    if not isinstance(picture, Mapping):
        raise ValueError(f"config.json says pretrained_cfg {picture!r}, which is no object.")
    return read_picture(settings, picture)


def read_picture(settings: OwnerSettings, picture: Mapping[str, Any]) -> OwnerSettings:
    """The settings with the mean and deviation that a config.json of timm tells.

    Args:
        settings: what is known besides.
        picture: its entry `pretrained_cfg`, as JSON values.

    Raises:
        ValueError: they are no three numbers.
    """
    return replace(
        settings,
        mean=_read_colour(picture.get("mean", settings.mean), "config.json", "mean"),
        std=_read_colour(picture.get("std", settings.std), "config.json", "std"),
    )


def _read_colour(value: Any, source: str, name: str) -> Colour:
    """A number for each channel out of a foreign file."""
    numbers = value if isinstance(value, list | tuple) else ()
    if not numbers or not all(
        isinstance(n, float | int) and not isinstance(n, bool) and abs(n) < 1e3 for n in numbers
    ) or ("std" in name and min(numbers) <= 0):  # fmt: skip
        raise ValueError(f"{source} says {name} {value!r}; a number for each channel it must be.")
    return tuple(float(number) for number in numbers)


# --------------------------------------------------------------------------- a model of timm


def inspect_timm(architecture: object, arguments: Mapping[str, Any], source: str) -> OwnerSettings:
    """What timm would build, seen from one block of it without weights.

    Args:
        architecture: name of it, as timm calls it; never an address of a model elsewhere.
        arguments: what it is made with.
        source: where that was found, in words for people.

    Raises:
        ValueError: timm does not know it, or its forward pass is not that of the plain ViT.
    """
    plain = architecture if isinstance(architecture, str) else ""
    plain = plain.partition(".")[0]  # behind the dot stands what it was trained on
    if not timm.is_model(plain):
        raise ValueError(
            f"{source} names the architecture {architecture!r}, which timm does not know."
        )
    parameters = {*inspect.signature(VisionTransformer).parameters}
    if unknown := sorted(str(key)[:40] for key in {*arguments} - parameters):
        raise ValueError(f"{source} makes {plain} with {unknown[0]!r}, which no ViT of timm takes.")
    names = {"dim": "embed_dim", "depth": "depth", "patch_size": "patch_size"}
    sizes = {field: arguments[name] for field, name in names.items() if name in arguments}
    small = {**arguments, "num_classes": 0}
    try:  # one block tells all, and no number of the file costs more than that
        with torch.device("meta"):
            model: Any = timm.create_model(plain, **{**small, "depth": 1})
    except Exception as error:  # whatever timm's constructors do with a stranger's values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{source}: timm does not make {plain} of it ({reason}).") from None
    if difference := find_difference(model):
        raise ValueError(f"{source} says {plain}: {difference}, which the plain ViT here has not.")
    block = model.blocks[0]
    return OwnerSettings(
        source=f"{source} ({plain})",
        heads=int(block.attn.num_heads),
        norm_eps=float(block.norm1.eps),
        qkv_bias=block.attn.qkv.bias is not None,
        sizes={"dim": int(model.embed_dim), **sizes},
    )


def find_difference(model: nn.Module) -> str:
    """The first thing in which a model of timm computes something else; empty = nothing.

    Args:
        model: one of timm's, of one block or more.
    """
    if type(model) is not VisionTransformer:
        return f"a {type(model).__name__}"
    block: Any = model.blocks[0]
    if type(block) is not Block:
        return f"blocks of the kind {type(block).__name__}"
    if model.global_pool not in ("token", ""):
        return f"features pooled by {model.global_pool!r} in the place of the class token"
    if model.no_embed_class or model.cls_token is None or model.num_prefix_tokens != 1:
        return "class or register tokens of another kind"
    identities = {
        "a norm before the blocks": model.norm_pre,
        "a norm behind the pooling": model.fc_norm,
        "LayerScale": block.ls1,
    }
    for difference, module in identities.items():
        if not isinstance(module, nn.Identity):
            return difference
    norms = (block.norm1, block.norm2, model.norm)
    if not all(isinstance(n, nn.LayerNorm) and n.eps == block.norm1.eps for n in norms):
        return f"norms of the kind {type(block.norm1).__name__}"
    activation = block.mlp.act
    if not isinstance(activation, nn.GELU) or activation.approximate != "none":
        return f"the activation {type(activation).__name__}"
    return ""


# ------------------------------------------------------------------------- options in a file


def read_settings_inside(tree: Mapping[Any, Any], prefix: str, heads: int = 0) -> OwnerSettings:
    """What a checkpoint says beside its weights: our number of heads, an architecture's name.

    timm and DeiT save the name of the model, DINO and MoCo v3 that of their own networks.

    Args:
        tree: content of the file, with its options as plain values or stand-ins.
        prefix: text in front of the names of the encoder that is read.
        heads: what the user says, which overrules the networks of DINO and MoCo v3.

    Raises:
        ValueError: it names a model of timm whose forward pass is not that of the plain ViT.
    """
    if saved_heads := _as_count(tree.get("num_heads")):
        return OwnerSettings(source="num_heads in the file", heads=saved_heads)
    saved = tree.get("args")
    options = saved.fields if isinstance(saved, StandIn) else saved
    options = options if isinstance(options, Mapping) else {}
    name = next((n for n in (tree.get("arch"), options.get("model"), options.get("arch"))
                 if isinstance(n, str)), "")  # fmt: skip
    prefix_words = {*re.split(r"[._]", prefix)}
    moco_v3 = "encoder" in prefix_words and bool(prefix_words & {"base", "momentum"})
    if moco_v3 and name in _MOCO_V3_HEADS:
        return OwnerSettings(
            source=f"arch {name!r} of MoCo v3", heads=heads or _MOCO_V3_HEADS[name]
        )
    if prefix_words & {"student", "teacher"} and name in _DINO_HEADS:
        return OwnerSettings(source=f"arch {name!r} of DINO", heads=heads or _DINO_HEADS[name])
    if timm.is_model(name.partition(".")[0]) and name.startswith(("vit_", "deit_")):
        keywords = options.get("model_kwargs")
        arguments = keywords if isinstance(keywords, Mapping) else {}
        return inspect_timm(name, arguments, "the file")
    if name:
        _log.info("the name %r in the file tells nothing of its Vision Transformer", name)
    return OwnerSettings()


def _as_count(value: object) -> int:
    """A number of things from a foreign file; 0 where it is anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
