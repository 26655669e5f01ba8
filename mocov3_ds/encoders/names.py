"""A Vision Transformer's weights under the names that programs give them; pure functions.

Ours are timm's (DeiT's are the same). Read: timm and DeiT, the published MoCo v3 files, mmpretrain
and its predecessors, transformers, any of them below prefixes such as `module.base_encoder.`.
Written: timm, transformers, MoCo v3. Which layout a file has is seen from its names.

Shape suffixes: N = tokens (class token first), D = embedding.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mocov3_ds.model.vit import PAPER_SHAPES, VitShape

Which = Literal["base", "momentum"]
Tensors = Mapping[str, Tensor]

_CLASS_TOKEN = "cls_token"
_OF_THE_AVERAGE = ("momentum", "ema", "teacher", "target")
_PARTS = r"(weight|bias)$"

_MMPRETRAIN = [
    (r"^patch_embed\.projection\." + _PARTS, r"patch_embed.proj.\1"),
    (r"^layers\.(\d+)\.(?:ln|norm)([12])\." + _PARTS, r"blocks.\1.norm\2.\3"),
    (r"^layers\.(\d+)\.attn\.(qkv|proj)\." + _PARTS, r"blocks.\1.attn.\2.\3"),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\." + _PARTS, r"blocks.\1.mlp.fc1.\2"),
    (r"^layers\.(\d+)\.ffn\.layers\.1\." + _PARTS, r"blocks.\1.mlp.fc2.\2"),
    (r"^(?:ln|norm)1\." + _PARTS, r"norm.\1"),
]
_TRANSFORMERS = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\." + _PARTS, r"patch_embed.proj.\1"),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\." + _PARTS, r"blocks.\1.norm1.\2"),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\." + _PARTS, r"blocks.\1.norm2.\2"),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\." + _PARTS,
     r"blocks.\1.attn.\2.\3"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\." + _PARTS, r"blocks.\1.attn.proj.\2"),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\." + _PARTS, r"blocks.\1.mlp.fc1.\2"),
    (r"^encoder\.layer\.(\d+)\.output\.dense\." + _PARTS, r"blocks.\1.mlp.fc2.\2"),
    (r"^layernorm\." + _PARTS, r"norm.\1"),
]  # fmt: skip


def to_timm(tensors: Tensors, which: Which = "base") -> dict[str, Tensor]:
    """The backbone in timm's names, fp32; heads, optimizer and other networks are left behind.

    Args:
        tensors: a state dict in any layout that is read.
        which: the encoder that is wanted where a file holds two.

    Raises:
        ValueError: no Vision Transformer among the names, not the wanted encoder, a convolutional
            stem, weights that are missing.
    """
    prefix = _prefix(tensors, which)
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if any(name.startswith("patch_embed.proj.0.") for name in own):
        raise ValueError("its patches come from a convolutional stem, which has no counterpart.")
    for rules in (_TRANSFORMERS, _MMPRETRAIN):
        own = {_renamed(name, rules): tensor for name, tensor in own.items()}
    own = _joined_attention(own)
    depth = 1 + max(
        (int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in own) if m), default=-1
    )
    wanted = _backbone_names(depth) if depth else set()
    missing = sorted(wanted - {*own})
    if missing or not depth:
        raise ValueError(
            f"{len(missing)} weights of a {depth}-block Vision Transformer are missing below "
            f"{prefix!r}: {', '.join(missing[:6])}{' ...' * (len(missing) > 6)}."
            if depth
            else f"it holds no transformer blocks below {prefix!r}."
        )
    names = wanted | {n for n in own if n == "pos_embed" or has_qk_norm([n])}
    return {name: own[name].detach().float().contiguous() for name in sorted(names)}


def has_qk_norm(names: Iterable[str]) -> bool:
    """Whether names (timm's) are of a ViT with norms on the queries and keys of each head."""
    return any(re.match(r"blocks\.\d+\.attn\.[qk]_norm\.", name) for name in names)


def shape_of(tensors: Tensors, heads: int = 0) -> VitShape:
    """Sizes of a backbone in timm's names.

    Weights do not tell the number of heads. Where it is not given, it is the paper's for the
    paper's widths (12, 12, 16, 16 for 384, 768, 1024, 1280); a DeiT ViT-S has 6.

    Args:
        tensors: see `to_timm`.
        heads: attention heads; 0 = see above.

    Raises:
        ValueError: the heads are not known, a grid that is not square.
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
    """Names of transformers' ViT as its files hold them (q, k and v apart)."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := re.match(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)) is not None:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                target = f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"
                renamed[target] = rows.contiguous()
            continue
        for pattern, target in _INVERSE:
            if re.match(pattern, name):
                renamed[re.sub(pattern, target, name)] = tensor
                break
        else:
            raise AssertionError(f"{name} is no weight of a Vision Transformer")
    return renamed


def to_moco_v3(parts: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Names of the published MoCo v3 files.

    Args:
        parts: tensors by part: `base.backbone`, and where known `base.projector`, `predictor`,
            `momentum.backbone`, `momentum.projector`.
    """
    place = {
        "base.backbone": "module.base_encoder.",
        "base.projector": "module.base_encoder.head.",
        "momentum.backbone": "module.momentum_encoder.",
        "momentum.projector": "module.momentum_encoder.head.",
        "predictor": "module.predictor.",
    }
    return {
        place[part] + name: tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


_INVERSE = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\." + _PARTS, r"embeddings.patch_embeddings.projection.\1"),
    (r"^blocks\.(\d+)\.norm1\." + _PARTS, r"encoder.layer.\1.layernorm_before.\2"),
    (r"^blocks\.(\d+)\.norm2\." + _PARTS, r"encoder.layer.\1.layernorm_after.\2"),
    (r"^blocks\.(\d+)\.attn\.proj\." + _PARTS, r"encoder.layer.\1.attention.output.dense.\2"),
    (r"^blocks\.(\d+)\.mlp\.fc1\." + _PARTS, r"encoder.layer.\1.intermediate.dense.\2"),
    (r"^blocks\.(\d+)\.mlp\.fc2\." + _PARTS, r"encoder.layer.\1.output.dense.\2"),
    (r"^norm\." + _PARTS, r"layernorm.\1"),
]


def _prefix(tensors: Tensors, which: Which) -> str:
    """What stands before the names of the wanted encoder."""
    found = [
        name.removesuffix(_CLASS_TOKEN).removesuffix("embeddings.")
        for name in tensors
        if name == _CLASS_TOKEN or name.endswith("." + _CLASS_TOKEN)
    ]
    if not found:
        raise ValueError(
            f"no Vision Transformer with a class token is in it; its {len(tensors)} tensors are "
            f"{', '.join(list(tensors)[:4])} ..."
            if tensors
            else "it holds no tensors."
        )
    averaged = [p for p in found if any(word in p.lower() for word in _OF_THE_AVERAGE)]
    candidates = averaged if which == "momentum" else [p for p in found if p not in averaged]
    if len(candidates) != 1:
        there = ", ".join(repr(p) for p in found)
        raise ValueError(
            f"it holds {len(candidates) or 'no'} {which} encoder{'s' * (len(candidates) > 1)}; "
            f"class tokens stand below {there}."
        )
    return candidates[0]


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, target in rules:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    return name


def _joined_attention(tensors: Tensors) -> dict[str, Tensor]:
    """Put q, k and v that lie apart into one tensor."""
    joined = dict(tensors)
    for name in tensors:
        if (match := re.match(r"(blocks\.\d+\.attn\.)query\.(weight|bias)$", name)) is None:
            continue
        names = [f"{match[1]}{part}.{match[2]}" for part in ("query", "key", "value")]
        if all(part in joined for part in names):
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in names])
    return joined


def _backbone_names(depth: int) -> set[str]:
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = [f"blocks.{i}.{layer}" for i in range(depth) for layer in layers]
    modules += ["patch_embed.proj", "norm"]
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")} | {
        _CLASS_TOKEN
    }
