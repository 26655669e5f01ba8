"""Encoders that are models of timm, or have a convolutional stem: told from files, and built.

The plain Vision Transformer is read by the names of many programs (`foreign_names`). Any other
model of timm needs a word that says which it is: timm's config.json beside the weights, the name
that timm and the published MoCo v3 code save with them (`arch`), what this program writes into its
own files, or the tensors themselves where they are a ResNet's. Its tensors have timm's names, which
for ResNets are torchvision's and those of the published MoCo v3 files.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.foreign_names import replace_prefix
from mocov3_ds.encoders.networks import Tensors, is_average, is_head, summarise_names
from mocov3_ds.encoders.owner_settings import OwnerSettings, find_difference, read_picture
from mocov3_ds.encoders.torch_file import StandIn
from mocov3_ds.encoders.weight_files import FoundWeights
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import (
    CONV_STEM_SHAPES,
    LARGEST_SIDE,
    BackboneShape,
    TimmShape,
    VitShape,
)
from mocov3_ds.model.tensor_differences import differing_tensors
from mocov3_ds.model.timm_backbone import build_timm, read_keywords
from mocov3_ds.model.vit import build_vit
from mocov3_ds.recipes import read_json
from mocov3_ds.settings.wording import count_noun

_CONV_STEMS = {"vit_conv_small": "vit_conv_s16", "vit_conv_base": "vit_conv_b16"}
"""names of the published code -> ours"""
# blocks of each stage, and whether a block has three convolutions
_RESNET_BLOCKS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_NOT_OF_THE_MODEL = ("num_classes", "in_chans", "img_size", "drop_path_rate")
_LARGEST_NUMBER, _MOST_VALUES = 8192, 64  # in the arguments of a stranger's file


@dataclass(frozen=True, kw_only=True)
class ClaimedNetwork:
    """What a file or its folder says that its tensors are."""

    shape: BackboneShape
    settings: OwnerSettings


def find_claim(found: FoundWeights) -> ClaimedNetwork | None:
    """Which network the settings or the tensors name, if it is another than the plain ViT.

    Args:
        found: tensors of a file or folder, with what lies beside them.

    Raises:
        ValueError: it is one that timm does not make.
    """
    if (claim := _read_config(found)) is not None:
        return claim
    name, arguments, source = _find_name(found)
    if name in _CONV_STEMS:
        shape = _measure_conv_stem(found.tensors, CONV_STEM_SHAPES[_CONV_STEMS[name]])
        if isinstance(heads := found.tree.get("num_heads"), int):
            shape = replace(shape, heads=heads)
        return ClaimedNetwork(shape=shape, settings=OwnerSettings(source=source))
    if not name:
        return None
    return _claim(name, arguments, OwnerSettings(source=source))


def _read_config(found: FoundWeights) -> ClaimedNetwork | None:
    """What timm's config.json beside the weights says."""
    path = found.folder / "config.json" if found.folder is not None else None
    if path is None or not path.is_file():
        return None
    tree = read_json(path)
    name, arguments = tree.get("architecture"), tree.get("model_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    picture = tree.get("pretrained_cfg", tree)
    picture = picture if isinstance(picture, Mapping) else {}
    pool = tree.get("global_pool")
    size = picture.get("input_size")
    arguments = {
        **({"global_pool": pool} if isinstance(pool, str) and pool else {}),
        **({"img_size": size[1:]} if isinstance(size, list) and len(size) == 3 else {}),
        **({"in_chans": size[0]} if isinstance(size, list) and len(size) == 3 else {}),
        **arguments,
    }
    plain = name.partition(".")[0]
    settings = OwnerSettings(source=f"config.json ({plain})")
    return _claim(plain, arguments, read_picture(settings, picture))


def _find_name(found: FoundWeights) -> tuple[str, Mapping[str, Any], str]:
    """Name and arguments of a model, and what says so; an empty name = nothing does."""
    tree = found.tree
    saved = tree.get("args")
    options = saved.fields if isinstance(saved, StandIn) else saved
    options = options if isinstance(options, Mapping) else {}
    arguments = tree.get("model_args", options.get("model_kwargs"))
    arguments = arguments if isinstance(arguments, Mapping) else {}
    for name in (tree.get("architecture"), tree.get("arch"), options.get("model")):
        plain = name.partition(".")[0] if isinstance(name, str) else ""
        if timm.is_model(plain) or plain in _CONV_STEMS:
            return plain, arguments, f"the name {plain!r} in the file"
    if name := _recognise_resnet(found.tensors):
        return name, {}, f"the tensors of a {name}"
    return "", {}, ""


def _measure_conv_stem(tensors: Tensors, published: VitShape) -> VitShape:
    """The shape of a Vision Transformer on convolutions, with the sizes that its tensors have."""
    stem = [name for name in tensors if re.search(r"(^|\.)patch_embed\.proj\.\d+\.weight$", name)]
    blocks = {
        match[1] for name in tensors if (match := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))
    }
    positions = next((t for n, t in tensors.items() if n.rpartition(".")[2] == "pos_embed"), None)
    if not stem or positions is None or positions.dim() != 3:
        return published
    last = max(stem, key=lambda name: int(name.split(".")[-2]))
    patch = 2 ** (int(last.split(".")[-2]) // 3)  # convolution, norm and ReLU for each
    side = round((positions.shape[1] - 1) ** 0.5) * patch
    return replace(
        published, dim=len(tensors[last]), depth=len(blocks), patch_size=patch, image_size=side
    )


def _recognise_resnet(tensors: Tensors) -> str:
    """Name of the ResNet whose tensors are there; empty = none of the paper's kind."""
    stages: dict[str, set[int]] = {}
    for name in tensors:
        if match := re.search(r"(?:^|\.)layer([1-4])\.(\d+)\.conv1\.weight$", name):
            stages.setdefault(match[1], set()).add(int(match[2]))
    has_third = any(re.search(r"(^|\.)layer1\.0\.conv3\.weight$", name) for name in tensors)
    blocks = tuple(len(stages.get(stage, ())) for stage in "1234")
    return _RESNET_BLOCKS.get((blocks, has_third), "")


def _claim(
    name: str, arguments: Mapping[str, Any], settings: OwnerSettings
) -> ClaimedNetwork | None:
    """The claim of a model of timm; None where the plain Vision Transformer is the same."""
    if not timm.is_model(name):
        return None  # the plain ViT's reader says what is wrong
    if not _is_small({**arguments, "img_size": 1}):
        if name.startswith(("vit_", "deit_")):
            return None
        raise ValueError(f"{settings.source} asks for a network beyond any: {arguments!r:.200}.")
    size, channels = arguments.get("img_size", 224), arguments.get("in_chans", 3)
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not all(isinstance(n, int) and 0 < n <= LARGEST_SIDE for n in (height, width, channels)):
        return None
    keywords = {key: value for key, value in arguments.items() if key not in _NOT_OF_THE_MODEL}
    shape = TimmShape(
        name=name,
        size=(height, width),
        channels=channels,
        arguments=tuple(f"{key}={json.dumps(value)}" for key, value in sorted(keywords.items())),
    )
    try:
        with torch.device("meta"):
            network = build_timm(shape)
    except ValueError as error:
        raise ValueError(f"{settings.source} names a model that cannot be made: {error}") from None
    except Exception:  # on this device; a plain ViT can be made there
        return ClaimedNetwork(shape=shape, settings=settings)
    inner_norms = any(re.search(r"(attn|mlp)\.norm\.", name) for name in network.state_dict())
    if isinstance(network, VisionTransformer) and not (inner_norms or find_difference(network)):
        return None
    return ClaimedNetwork(shape=shape, settings=settings)


def _is_small(value: object) -> bool:
    """Whether no number of a stranger's file asks for a network beyond any."""
    if isinstance(value, Mapping):
        return len(value) < _MOST_VALUES and all(map(_is_small, value.values()))
    if isinstance(value, list | tuple):
        return len(value) < _MOST_VALUES and all(map(_is_small, value))
    return not isinstance(value, int) or abs(value) <= _LARGEST_NUMBER


def find_prefix(
    tensors: Tensors, shape: BackboneShape, role: EncoderRole, expected: Tensors | None = None
) -> str:
    """The text in front of all names of one encoder that is such a network.

    Args:
        tensors: tensors of a file by their whole names.
        shape: the network that they are.
        role: encoder to choose from a file that holds two.
        expected: tensors of the network by name, where they are at hand.

    Raises:
        ValueError: not this encoder, or several of it.
    """
    expected = expected or build_network(shape).state_dict()
    first = next(iter(expected))
    prefixes = [
        prefix
        for name in tensors
        if name == first or name.endswith(f".{first}")
        for prefix in [name.removesuffix(first)]
        if 2 * sum(prefix + tensor_name in tensors for tensor_name in expected) > len(expected)
    ]
    if not prefixes:
        raise ValueError(
            f"its tensors are not those of {shape_name(shape)}, the network that its settings name."
        )
    of_role = [prefix for prefix in prefixes if is_average(prefix) == (role == "momentum")]
    if len(of_role) != 1:
        raise ValueError(
            f"it holds {len(of_role) or 'no'} {role} encoder{'s' * (len(of_role) > 1)}; its "
            f"networks stand below {', '.join(map(repr, prefixes))}."
        )
    return of_role[0]


def take_tensors(
    tensors: Tensors, shape: BackboneShape, role: EncoderRole
) -> tuple[dict[str, Tensor], str]:
    """One encoder's tensors in the names of its network, and what is left out, in groups.

    Args:
        tensors: tensors of a file by their whole names.
        shape: the network that they are.
        role: encoder to take from a file that holds two.

    Raises:
        ValueError: not this encoder, several of it, or tensors that the network does not have.
    """
    expected = build_network(shape).state_dict()
    prefix = find_prefix(tensors, shape, role, expected)
    network_tensors = replace_prefix(tensors, prefix, "")
    homeless = [
        n for n in network_tensors if not (n in expected or is_head(n) or _is_foreign(n, prefix))
    ]
    missing = [
        n for n in expected if n not in network_tensors and not n.endswith("num_batches_tracked")
    ]
    for names, problem in ((homeless, "has no place for"), (missing, "lacks")):
        if names:
            raise ValueError(
                f"the network that its settings name {problem} {count_noun(len(names), 'tensor')}: "
                f"{', '.join(names[:6])}{' ...' * (len(names) > 6)}."
            )
    backbone = {name: network_tensors.get(name, expected[name]).detach() for name in expected}
    backbone = {n: t.float() if t.is_floating_point() else t for n, t in backbone.items()}
    for name, tensor in backbone.items():
        if tensor.is_meta or not bool(tensor.isfinite().all()):
            raise ValueError(f"{prefix}{name} holds numbers that are not finite, or no content.")
    unused = [name for name in tensors if name.removeprefix(prefix) not in expected]
    return backbone, summarise_names(unused, prefix)


def _is_foreign(name: str, prefix: str) -> bool:
    """Whether a tensor beside a network without prefix belongs to an optimizer or another one."""
    return not prefix and is_average(name.partition(".")[0] + ".")


def build_network(shape: BackboneShape, drop_path: float = 0.0) -> nn.Module:
    """A network of this shape without batch norm over ranks, fp32, with random weights.

    Args:
        shape: a model of timm, or a Vision Transformer with a convolutional stem.
        drop_path: stochastic depth rate of the last block.

    Raises:
        ValueError: it cannot be built.
    """
    match shape:
        case VitShape():
            return build_vit(shape, drop_path=drop_path)
        case TimmShape():
            return build_timm(shape, drop_path)
        case own:
            return own.make()


def load_network(
    shape: BackboneShape, tensors: Mapping[str, Tensor], drop_path: float = 0.0
) -> nn.Module:
    """The network with these weights; positions are fitted to its images where timm knows how.

    Args:
        shape: what to build, with the size of the images that it will see.
        tensors: weights in the network's own names; they are copied.
        drop_path: stochastic depth rate of the last block.

    Raises:
        ValueError: weights that do not fit.
    """
    network = build_network(shape, drop_path)
    fitted = dict(tensors)
    if differing_tensors(network.state_dict(), fitted):
        fitted = _fit_positions(network, fitted)
    if names := differing_tensors(network.state_dict(), fitted):
        raise ValueError(
            f"{len(names)} weights do not fit a network for images of {shape.size[0]} x "
            f"{shape.size[1]} pixels: {json.dumps(names[:3])}."
        )
    network.load_state_dict(fitted)
    return network


def _fit_positions(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the module of timm that defines the network fits them to another size."""
    fit = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if fit is None:
        return tensors
    fitted: dict[str, Tensor] = fit(dict(tensors), network)
    return fitted


def write_arguments(shape: TimmShape) -> dict[str, Any]:
    """What `timm.create_model(shape.name, ...)` needs for this network, as JSON values.

    Args:
        shape: a model of timm.
    """
    network_keywords = read_keywords(shape.arguments)
    if shape.channels != 3:
        network_keywords["in_chans"] = shape.channels
    if _takes_size(shape):
        height, width = shape.size
        network_keywords["img_size"] = height if height == width else [height, width]
    return network_keywords | {"num_classes": 0}


def _takes_size(shape: TimmShape) -> bool:
    """Whether timm's constructor takes the size of the images."""
    try:
        with torch.device("meta"):
            timm.create_model(shape.name, img_size=shape.size, num_classes=0)
    except TypeError:
        return False
    except Exception:  # it was backbone, and does not suit the plain arguments
        return True
    return True


def with_size(shape: BackboneShape, image_size: int) -> BackboneShape:
    """The same network for square images of another side; 0 = as it is."""
    if not image_size:
        return shape
    if isinstance(shape, VitShape):
        return replace(shape, image_size=image_size, image_width=0)
    return replace(shape, size=(image_size, image_size))
