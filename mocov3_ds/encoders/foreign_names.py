"""What do other programs call a Vision Transformer, its sizes and its tensors? Pure functions.

Our own names are timm's, and DeiT's are the same. Read are the names of timm and DeiT, of the
published MoCo v3 files, of mmpretrain and its predecessors, and of transformers, each below any
prefix such as `module.base_encoder.`. Written are timm's, transformers' and MoCo v3's. The names
themselves tell which program wrote a file.

Shape suffixes: N = tokens (class token first), D = embedding.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.networks import (
    CLASS_TOKEN,
    Tensors,
    choose_prefix,
    find_prefixes,
    is_head,
    summarise_names,
)
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape
from mocov3_ds.settings.wording import count_noun

_PROJECTIONS = ("query", "key", "value")
_REASONS = {  # what the plain ViT lacks, by a word of the tensor's name
    r"(^|\.)(ls\d?|gamma\w*|layer_?scale\w*|lambda\w*)(\.|$)": "LayerScale",
    r"reg(ister)?_tokens?": "register tokens",
    r"dist(illation)?_token": "a distillation token",
    r"rope|freqs": "rotary positions",
    r"rel(ative)?_pos": "relative positions",
    r"attn_pool": "attention pooling",
    r"fc_norm": "the mean of the patches as features",
    r"mlp\.(w\d+|fc1_\w+|gate\w*|weights_in)": "a gated MLP",
    r"lora_|base_layer|ia3_l": "adapters of PEFT: merge them first, merge_and_unload()",
    r"norm": "a norm that it has not",
}

_HINT_OF_BIASES = "; a model without them says so (qkv_bias false) in a config.json beside it"

# Modules by timm's name, "#" for the number of a block.
_TRANSFORMERS = {
    CLASS_TOKEN: "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.#.norm1": "encoder.layer.#.layernorm_before",
    "blocks.#.norm2": "encoder.layer.#.layernorm_after",
    **{f"blocks.#.attn.{x}": f"encoder.layer.#.attention.attention.{x}" for x in _PROJECTIONS},
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
    "blocks.#.mlp.fc1": "encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.fc2": "encoder.layer.#.output.dense",
    "norm": "layernorm",
}
_TRANSFORMERS_5 = {  # modules since its version 5; its folders keep the older names
    "blocks.#.norm1": "layers.#.layernorm_before",
    "blocks.#.norm2": "layers.#.layernorm_after",
    **{f"blocks.#.attn.{x}": f"layers.#.attention.{x[0]}_proj" for x in _PROJECTIONS},
    "blocks.#.attn.proj": "layers.#.attention.o_proj",
    "blocks.#.mlp.fc1": "layers.#.mlp.fc1",
    "blocks.#.mlp.fc2": "layers.#.mlp.fc2",
}
_MMPRETRAIN = {  # its predecessors write "norm" for "ln"
    "patch_embed.proj": "patch_embed.projection",
    "blocks.#.norm1": "layers.#.ln1",
    "blocks.#.norm2": "layers.#.ln2",
    "blocks.#.attn.qkv": "layers.#.attn.qkv",
    "blocks.#.attn.proj": "layers.#.attn.proj",
    "blocks.#.mlp.fc1": "layers.#.ffn.layers.0.0",
    "blocks.#.mlp.fc2": "layers.#.ffn.layers.1",
    "norm": "ln1",
}
_TO_TIMM = {
    foreign: timm
    for table in (_TRANSFORMERS, _TRANSFORMERS_5, _MMPRETRAIN)
    for timm, name in table.items()
    for foreign in (name, name.replace("ln", "norm"))
}


class Backbone(NamedTuple):
    """One encoder out of the tensors of a file."""

    tensors: dict[str, Tensor]
    """in timm's names, fp32"""
    prefix: str
    """text in front of its names in the file"""
    left_out: str
    """groups of tensors that have no part in its features, with their counts; may be empty"""


def to_timm(tensors: Tensors, role: EncoderRole = "base") -> dict[str, Tensor]:
    """The backbone in timm's names; see `take_backbone`."""
    return take_backbone(tensors, role).tensors


def take_backbone(
    tensors: Tensors, role: EncoderRole = "base", *, qkv_bias: bool = True
) -> Backbone:
    """The backbone in timm's names, fp32, without heads, optimizer and other networks.

    Args:
        tensors: state dict of any program that is read.
        role: encoder to take from a file that holds two.
        qkv_bias: False where the settings beside the weights say that queries, keys and values
            have no bias: it is zero then.

    Raises:
        ValueError: no Vision Transformer among the names, not this encoder, tensors that a plain
            Vision Transformer has no place for, or missing weights.
    """
    prefix = choose_prefix(tensors, role)
    network = replace_prefix(tensors, prefix, "")
    if any(name.startswith("patch_embed.proj.0.") for name in network):
        raise ValueError("its patches come from a convolutional stem, which has no counterpart.")
    inner = [p.removeprefix(prefix) for p in find_prefixes(tensors) if p.startswith(prefix)]
    inner_networks = tuple(p for p in inner if p)
    own_tensors = {
        name: t
        for name, t in network.items()
        if not (name.startswith(inner_networks) or is_head(name))
    }
    backbone = _join_attention({_rename(name, _TO_TIMM): t for name, t in own_tensors.items()})
    blocks = (re.match(r"blocks\.(\d+)\.", name) for name in backbone)
    depth = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    if not qkv_bias:
        _add_zero_biases(backbone)
    required = _backbone_names(min(max(depth, 1), len(backbone)))
    used = required | {n for n in backbone if n == "pos_embed" or has_qk_norm([n])}
    if (factors := _layer_scale_names(depth)) <= {*backbone}:
        used |= factors
    if homeless := [name for name in own_tensors if _timm_name(name) not in used]:
        raise ValueError(_explain_homeless(homeless, prefix))
    if not depth:
        raise ValueError(f"it holds no transformer blocks below {prefix!r}.")
    if missing := sorted(required - {*backbone}):
        raise ValueError(
            f"{len(missing)} weights of a {depth}-block Vision Transformer are missing below "
            f"{prefix!r}: {', '.join(missing[:6])}{' ...' * (len(missing) > 6)}"
            + _HINT_OF_BIASES * all(name.endswith("qkv.bias") for name in missing)
            + "."
        )
    for name in sorted(used):
        _check_numbers(prefix + name, backbone[name])
    unused = [name for name in tensors if not name.startswith(prefix)]
    unused += [prefix + name for name in network if name not in own_tensors]
    return Backbone(
        {name: backbone[name].detach().float().contiguous() for name in sorted(used)},
        prefix,
        summarise_names(unused, prefix),
    )


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Refuse what is no weight: other types than floating point, no content, NaN and infinity."""
    if not tensor.is_floating_point():
        kind = f"{tensor.dtype}".removeprefix("torch.")
        raise ValueError(f"{name} holds {kind}, of which the weights cannot be told.")
    if tensor.is_meta:
        raise ValueError(f"{name} has a shape alone, and no content (device meta).")
    if count := int((~tensor.float().isfinite()).sum()):
        raise ValueError(f"{count} of {tensor.numel()} numbers of {name} are not finite.")


def _timm_name(name: str) -> str:
    """The tensor's name in timm, where q, k and v are one."""
    renamed = _rename(name, _TO_TIMM)
    return re.sub(r"\.attn\.(query|key|value)\.", ".attn.qkv.", renamed)


def _explain_homeless(names: list[str], prefix: str) -> str:
    """Why a backbone with these tensors is not loaded, each kind of them named once or twice."""
    kinds = {re.sub(r"\d+", "#", name): name for name in reversed(names)}
    examples = [*reversed(kinds.values())]
    lacking = [next((r for p, r in _REASONS.items() if re.search(p, n)), "") for n in names]
    reasons = ", ".join(dict.fromkeys(filter(None, lacking)))
    return (
        f"the plain Vision Transformer here has no place for {count_noun(len(names), 'tensor')} "
        f"below {prefix!r}, which would change its features: {', '.join(examples[:6])}"
        + " ..." * (len(examples) > 6)
        + (f" ({reasons})." if reasons else ".")
    )


def _add_zero_biases(backbone: dict[str, Tensor]) -> None:
    """Give queries, keys and values the bias of zero that is the same as none."""
    for name, weight in [*backbone.items()]:
        if name.endswith(".attn.qkv.weight"):
            bias = torch.zeros(len(weight), dtype=weight.dtype)
            backbone.setdefault(name.replace("weight", "bias"), bias)


def has_qk_norm(names: Iterable[str]) -> bool:
    """Whether timm's names are those of a ViT with norms on the queries and keys of each head."""
    return any(re.match(r"blocks\.\d+\.attn\.[qk]_norm\.", name) for name in names)


def has_layer_scale(names: Iterable[str]) -> bool:
    """Whether timm's names are those of a ViT with LayerScale on each branch."""
    return "blocks.0.ls1.gamma" in names


def _layer_scale_names(depth: int) -> set[str]:
    """Tensors of LayerScale that a ViT of so many blocks has."""
    return {f"blocks.{block}.ls{branch}.gamma" for block in range(depth) for branch in (1, 2)}


def infer_shape(tensors: Tensors, heads: int = 0) -> VitShape:
    """Sizes of a backbone.

    The weights do not tell the number of attention heads. The paper has 12, 12, 16 and 16 for the
    widths 384, 768, 1024 and 1280; other programs may differ, a DeiT ViT-S has 6.

    Args:
        tensors: weights of the backbone in timm's names.
        heads: number of attention heads; 0 = the paper's for the width.

    Raises:
        ValueError: the number of heads is not known, or the patches form no square.
    """
    projection = tensors["patch_embed.proj.weight"]
    if projection.dim() != 4 or projection.shape[2] != projection.shape[3]:
        raise ValueError(f"its patches of the shape {[*projection.shape]} are no squares.")
    dim, channels, patch, _ = projection.shape
    heads = heads or {shape.dim: shape.heads for shape in PAPER_SHAPES.values()}.get(dim, 0)
    if not heads:
        raise ValueError(
            f"weights of width {dim} do not tell the number of attention heads; give --heads."
        )
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    image = 224 // patch * patch
    if "pos_embed" in tensors:
        if tensors["pos_embed"].dim() != 3:
            raise ValueError(f"its positions have the shape {[*tensors['pos_embed'].shape]}.")
        tokens = tensors["pos_embed"].shape[1] - 1
        grid = round(tokens**0.5)
        if grid * grid != tokens:
            raise ValueError(
                f"its {tokens + 1} positions are no square grid with one more for the class token."
            )
        image = grid * patch
    return VitShape(
        image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, channels=channels
    )


def to_transformers(tensors: Tensors) -> dict[str, Tensor]:
    """The backbone in the names of transformers' ViT, whose files hold q, k and v apart.

    Args:
        tensors: weights of the backbone in timm's names.
    """
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for projection, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                apart[name.replace("qkv", projection)] = rows.contiguous()
        else:
            apart[name] = tensor
    renamed = {_rename(name, _TRANSFORMERS): tensor for name, tensor in apart.items()}
    if unknown := {*apart} & {*renamed}:
        raise AssertionError(f"{', '.join(unknown)} is no weight of a Vision Transformer")
    return renamed


def replace_prefix(tensors: Tensors, prefix: str, replacement: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, below another prefix."""
    return {
        replacement + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _rename(name: str, modules: Mapping[str, str]) -> str:
    """The tensor's name with its module as `modules` calls it; other names stay as they are."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    number = re.search(r"\.(\d+)\.", module)  # of the block: the first of several numbers
    target = modules.get(re.sub(r"\.\d+\.", ".#.", module, count=1))
    if target is None:
        return name
    return target.replace("#", number[1] if number else "") + name.removeprefix(module)


def _join_attention(tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors, with q, k and v of each block as one."""
    joined = dict(tensors)
    for name in tensors:
        names = [name.replace(".query.", f".{projection}.") for projection in _PROJECTIONS]
        if ".attn.query." in name and {*names} <= {*joined}:
            joined[name.replace("query", "qkv")] = torch.cat([*map(joined.pop, names)])
    return joined


def _backbone_names(depth: int) -> set[str]:
    """Tensors that every ViT of so many blocks has, with q, k and v as one."""
    modules = {name.replace("#", f"{i}") for name in _MMPRETRAIN for i in range(depth)}
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return names | {CLASS_TOKEN}


_ARCHITECTURES = {  # names of the same sizes in timm, and in the published code where it has them
    "vit_s16": ("vit_small_patch16_224", "vit_small"),
    "vit_b16": ("vit_base_patch16_224", "vit_base"),
    "vit_l16": ("vit_large_patch16_224", "vit_large"),
    "vit_h14": ("vit_huge_patch14_224", "vit_huge"),
}


def timm_sizes(shape: VitShape, names: Collection[str] = ()) -> dict[str, Any]:
    """Arguments that turn any of timm's ViTs into the one of this shape.

    Args:
        shape: sizes of the encoder.
        names: names of its tensors, which tell norms on queries and keys, and LayerScale.
    """
    return {
        "img_size": shape.size if shape.image_width else shape.image_size,
        **({"in_chans": shape.channels} if shape.channels != 3 else {}),
        "patch_size": shape.patch_size,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": 0,
        **({"qk_norm": True} if has_qk_norm(names) else {}),
        **({"init_values": 1.0} if has_layer_scale(names) else {}),  # the weights replace it
    }


def architecture_names(shape: VitShape) -> tuple[str, str]:
    """Names of an architecture in timm and in the published code."""
    for name, paper_shape in PAPER_SHAPES.items():
        if replace(shape, image_size=224, image_width=0, channels=3) == paper_shape:
            return _ARCHITECTURES[name]
    return "vit_base_patch16_224", f"vit_{shape.dim}_{shape.depth}_{shape.patch_size}"
