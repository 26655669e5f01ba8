"""What do other programs call a Vision Transformer, its sizes and its tensors? Pure functions.

Our own names are timm's, and DeiT's are the same. Read are the names of timm and DeiT, of the
published MoCo v3 files, of mmpretrain and its predecessors, and of transformers, each below any
prefix such as `module.base_encoder.`. Written are timm's, transformers' and MoCo v3's. The names
themselves tell which program wrote a file.

Shape suffixes: N = tokens (class token first), D = embedding.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mocov3_ds.model.vit import PAPER_SHAPES, VitShape

EncoderRole = Literal["base", "momentum"]
"""the encoder that gradients train, or its moving average"""
Format = Literal["timm", "deit", "hf", "moco-v3"]
"""program that weights are written for"""
Tensors = Mapping[str, Tensor]

_CLASS_TOKEN = "cls_token"
_PROJECTIONS = ("query", "key", "value")
_AVERAGE_WORDS = ("momentum", "ema", "teacher", "target")
_SUFFIX = r"(weight|bias)$"

_MMPRETRAIN = [
    (r"^patch_embed\.projection\." + _SUFFIX, r"patch_embed.proj.\1"),
    (r"^layers\.(\d+)\.(?:ln|norm)([12])\." + _SUFFIX, r"blocks.\1.norm\2.\3"),
    (r"^layers\.(\d+)\.attn\.(qkv|proj)\." + _SUFFIX, r"blocks.\1.attn.\2.\3"),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\." + _SUFFIX, r"blocks.\1.mlp.fc1.\2"),
    (r"^layers\.(\d+)\.ffn\.layers\.1\." + _SUFFIX, r"blocks.\1.mlp.fc2.\2"),
    (r"^(?:ln|norm)1\." + _SUFFIX, r"norm.\1"),
]
_TRANSFORMERS = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\." + _SUFFIX, r"patch_embed.proj.\1"),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\." + _SUFFIX, r"blocks.\1.norm1.\2"),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\." + _SUFFIX, r"blocks.\1.norm2.\2"),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\." + _SUFFIX,
     r"blocks.\1.attn.\2.\3"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\." + _SUFFIX, r"blocks.\1.attn.proj.\2"),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\." + _SUFFIX, r"blocks.\1.mlp.fc1.\2"),
    (r"^encoder\.layer\.(\d+)\.output\.dense\." + _SUFFIX, r"blocks.\1.mlp.fc2.\2"),
    (r"^layernorm\." + _SUFFIX, r"norm.\1"),
]  # fmt: skip


def to_timm(tensors: Tensors, role: EncoderRole = "base") -> dict[str, Tensor]:
    """The backbone in timm's names, fp32, without heads, optimizer and other networks.

    Args:
        tensors: state dict of any program that is read.
        role: encoder to take from a file that holds two.

    Raises:
        ValueError: no Vision Transformer among the names, not this encoder, a convolutional stem,
            or missing weights.
    """
    prefix = _find_prefix(tensors, role)
    backbone = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if any(name.startswith("patch_embed.proj.0.") for name in backbone):
        raise ValueError("its patches come from a convolutional stem, which has no counterpart.")
    for rules in (_TRANSFORMERS, _MMPRETRAIN):
        backbone = {_rename(name, rules): tensor for name, tensor in backbone.items()}
    backbone = _join_attention(backbone)
    blocks = (re.match(r"blocks\.(\d+)\.", name) for name in backbone)
    depth = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    required = _backbone_names(depth) if depth else set()
    missing = sorted(required - {*backbone})
    if missing or not depth:
        raise ValueError(
            f"{len(missing)} weights of a {depth}-block Vision Transformer are missing below "
            f"{prefix!r}: {', '.join(missing[:6])}{' ...' * (len(missing) > 6)}."
            if depth
            else f"it holds no transformer blocks below {prefix!r}."
        )
    names = required | {n for n in backbone if n == "pos_embed" or has_qk_norm([n])}
    return {name: backbone[name].detach().float().contiguous() for name in sorted(names)}


def has_qk_norm(names: Iterable[str]) -> bool:
    """Whether timm's names are those of a ViT with norms on the queries and keys of each head."""
    return any(re.match(r"blocks\.\d+\.attn\.[qk]_norm\.", name) for name in names)


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
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    heads = heads or {shape.dim: shape.heads for shape in PAPER_SHAPES.values()}.get(dim, 0)
    if not heads:
        raise ValueError(
            f"weights of width {dim} do not tell the number of attention heads; give --heads."
        )
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    image = 224 // patch * patch
    if "pos_embed" in tensors:
        tokens = tensors["pos_embed"].shape[1] - 1
        grid = round(tokens**0.5)
        if grid * grid != tokens:
            raise ValueError(f"its {tokens} positions are no square grid with a class token.")
        image = grid * patch
    return VitShape(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads)


def to_transformers(tensors: Tensors) -> dict[str, Tensor]:
    """The backbone in the names of transformers' ViT, whose files hold q, k and v apart.

    Args:
        tensors: weights of the backbone in timm's names.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := re.match(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)) is not None:
            for projection, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                target = f"encoder.layer.{match[1]}.attention.attention.{projection}.{match[2]}"
                renamed[target] = rows.contiguous()
        elif (target := _rename(name, _TO_TRANSFORMERS)) != name:
            renamed[target] = tensor
        else:
            raise AssertionError(f"{name} is no weight of a Vision Transformer")
    return renamed


def to_moco_v3(modules: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """All tensors of a run in the names of the published MoCo v3 files.

    Args:
        modules: tensors of `base.backbone`, and where known of `base.projector`, `predictor`,
            `momentum.backbone` and `momentum.projector`.
    """
    prefixes = {
        "base.backbone": "module.base_encoder.",
        "base.projector": "module.base_encoder.head.",
        "momentum.backbone": "module.momentum_encoder.",
        "momentum.projector": "module.momentum_encoder.head.",
        "predictor": "module.predictor.",
    }
    return {
        prefixes[module] + name: tensor
        for module, tensors in modules.items()
        for name, tensor in tensors.items()
    }


_TO_TRANSFORMERS = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\." + _SUFFIX, r"embeddings.patch_embeddings.projection.\1"),
    (r"^blocks\.(\d+)\.norm1\." + _SUFFIX, r"encoder.layer.\1.layernorm_before.\2"),
    (r"^blocks\.(\d+)\.norm2\." + _SUFFIX, r"encoder.layer.\1.layernorm_after.\2"),
    (r"^blocks\.(\d+)\.attn\.proj\." + _SUFFIX, r"encoder.layer.\1.attention.output.dense.\2"),
    (r"^blocks\.(\d+)\.mlp\.fc1\." + _SUFFIX, r"encoder.layer.\1.intermediate.dense.\2"),
    (r"^blocks\.(\d+)\.mlp\.fc2\." + _SUFFIX, r"encoder.layer.\1.output.dense.\2"),
    (r"^norm\." + _SUFFIX, r"layernorm.\1"),
]


def _find_prefix(tensors: Tensors, role: EncoderRole) -> str:
    """The text in front of all names of an encoder."""
    prefixes = [
        name.removesuffix(_CLASS_TOKEN).removesuffix("embeddings.")
        for name in tensors
        if name == _CLASS_TOKEN or name.endswith("." + _CLASS_TOKEN)
    ]
    if not prefixes:
        raise ValueError(
            f"no Vision Transformer with a class token is in it; its {len(tensors)} tensors are "
            f"{', '.join(list(tensors)[:4])} ..."
            if tensors
            else "it holds no tensors."
        )
    averages = [p for p in prefixes if any(word in p.lower() for word in _AVERAGE_WORDS)]
    candidates = averages if role == "momentum" else [p for p in prefixes if p not in averages]
    if len(candidates) != 1:
        raise ValueError(
            f"it holds {len(candidates) or 'no'} {role} encoder{'s' * (len(candidates) > 1)}; "
            f"class tokens stand below {', '.join(map(repr, prefixes))}."
        )
    return candidates[0]


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, target in rules:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    return name


def _join_attention(tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors, with q, k and v of each block as one."""
    joined = dict(tensors)
    for name in tensors:
        if (match := re.match(r"(blocks\.\d+\.attn\.)query\.(weight|bias)$", name)) is None:
            continue
        names = [f"{match[1]}{projection}.{match[2]}" for projection in _PROJECTIONS]
        if all(name in joined for name in names):
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([joined.pop(name) for name in names])
    return joined


def _backbone_names(depth: int) -> set[str]:
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = [f"blocks.{i}.{layer}" for i in range(depth) for layer in layers]
    modules += ["patch_embed.proj", "norm"]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return names | {_CLASS_TOKEN}


_ARCHITECTURES = {  # names of the same sizes in timm, and in the published code where it has them
    "vit_s16": ("vit_small_patch16_224", "vit_small"),
    "vit_b16": ("vit_base_patch16_224", "vit_base"),
    "vit_l16": ("vit_large_patch16_224", "vit_large"),
    "vit_h14": ("vit_huge_patch14_224", "vit_huge"),
}


def timm_sizes(shape: VitShape, *, qk_norm: bool = False) -> dict[str, Any]:
    """Arguments that turn any of timm's ViTs into the one of this shape.

    Args:
        shape: sizes of the encoder.
        qk_norm: whether its attention has norms on queries and keys.
    """
    sizes = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": 0,
    }
    return sizes | {"qk_norm": True} if qk_norm else sizes


def architecture_names(shape: VitShape) -> tuple[str, str]:
    """Names of an architecture in timm and in the published code."""
    for name, paper_shape in PAPER_SHAPES.items():
        if replace(shape, image_size=224) == paper_shape:
            return _ARCHITECTURES[name]
    return "vit_base_patch16_224", f"vit_{shape.dim}_{shape.depth}_{shape.patch_size}"
