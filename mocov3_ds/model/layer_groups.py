"""Layer groups of a base encoder, from input to output: what is measured and studied together."""

LOSS_GROUP = "loss"
"""group of what the loss itself trains, which is no layer and has no signals"""

_BACKBONE_GROUPS = {"patch_embed": "patch_embed", "cls_token": "cls", "norm": "norm"}
"""first part of a name below the backbone -> group"""


def group_names(depth: int) -> tuple[str, ...]:
    """patch_embed, cls, block_0 ... block_{depth - 1}, norm, projector, predictor."""
    blocks = (f"block_{index}" for index in range(depth))
    return ("patch_embed", "cls", *blocks, "norm", "projector", "predictor")


def layer_group(name: str) -> str:
    """Group of a trained tensor, whatever module holds the encoder.

    Args:
        name: dotted name of the tensor, such as "base.backbone.blocks.3.attn.qkv.weight".

    Raises:
        ValueError: the name belongs to no group.
    """
    parts = name.split(".")
    if parts[0] == LOSS_GROUP:
        return LOSS_GROUP
    if "backbone" in parts:
        parts = parts[parts.index("backbone") + 1 :]
        if parts[0] == "blocks":
            return f"block_{int(parts[1])}"
        if parts[0] in _BACKBONE_GROUPS:
            return _BACKBONE_GROUPS[parts[0]]
    for head in ("projector", "predictor"):
        if head in parts:
            return head
    raise ValueError(f"the tensor {name!r} belongs to no layer group.")
