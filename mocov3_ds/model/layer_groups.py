"""Layer groups of a base encoder, from input to output: what is measured and studied together."""

from collections.abc import Iterable

LOSS_GROUP = "loss"
"""group of what the loss itself trains, which is no layer and has no signals"""
HEAD_GROUPS = ("projector", "predictor")

_CONTAINERS = ("blocks", "layers")
"""lists of blocks inside of a stage"""


def vit_groups(depth: int) -> tuple[str, ...]:
    """Groups of our Vision Transformers: patch_embed, cls, block_0 ... block_{depth - 1}, norm."""
    return ("patch_embed", "cls", *(f"block_{index}" for index in range(depth)), "norm")


def group_names(depth: int) -> tuple[str, ...]:
    """Groups of a base encoder on one of our Vision Transformers, heads last."""
    return (*vit_groups(depth), *HEAD_GROUPS)


def layer_group(name: str) -> str:
    """Group of a trained tensor, whatever module holds the encoder and whatever its backbone is.

    A group is named as the module is: "layer1.0", "stages.2.blocks.5", "stem"; the blocks of a
    transformer are block_0, block_1 ..., its class token is cls.

    Args:
        name: dotted name of the tensor, such as "base.backbone.blocks.3.attn.qkv.weight".

    Raises:
        ValueError: the name belongs to no group.
    """
    parts = name.split(".")
    if parts[0] == LOSS_GROUP:
        return LOSS_GROUP
    if "backbone" in parts[:-1]:
        return _backbone_group(parts[parts.index("backbone") + 1 :])
    for head in HEAD_GROUPS:
        if head in parts:
            return head
    raise ValueError(f"the tensor {name!r} belongs to no layer group.")


def _backbone_group(parts: list[str]) -> str:
    if parts == ["cls_token"]:
        return "cls"
    numbers = [name_part.isdigit() for name_part in parts] + [False] * 3
    if not numbers[1]:
        return parts[0]
    if numbers[2]:
        return ".".join(parts[:3])
    if numbers[3] and parts[2] in _CONTAINERS:
        return ".".join(parts[:4])
    return f"block_{parts[1]}" if parts[0] == "blocks" else ".".join(parts[:2])


def order_groups(names: Iterable[str]) -> tuple[str, ...]:
    """Groups of a backbone from input to output: tokens and tables come after the first layer.

    Args:
        names: names of its tensors in the order of its layers, as `named_parameters` gives them.
    """
    layers: dict[str, None] = {}
    tokens: dict[str, None] = {}
    for name in names:
        (layers if "." in name else tokens).setdefault(layer_group(f"backbone.{name}"))
    first, *later_layers = layers or tokens
    return tuple(dict.fromkeys((first, *tokens, *later_layers)))
