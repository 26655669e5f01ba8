"""Layer groups of a base encoder, from input to output: what is watched and studied together."""


def group_names(depth: int) -> tuple[str, ...]:
    """patch_embed, cls, block_0 ... block_{depth - 1}, norm, projector, predictor."""
    blocks = (f"block_{index}" for index in range(depth))
    return ("patch_embed", "cls", *blocks, "norm", "projector", "predictor")


def group_of(name: str) -> str:
    """Group of a parameter of the base encoder, whatever module holds the encoder.

    Args:
        name: such as "base.backbone.blocks.3.attn.qkv.weight".

    Raises:
        ValueError: the name belongs to no group.
    """
    parts = name.split(".")
    if "backbone" in parts:
        parts = parts[parts.index("backbone") + 1 :]
        if parts[0] == "patch_embed":
            return "patch_embed"
        if parts[0] == "cls_token":
            return "cls"
        if parts[0] == "blocks":
            return f"block_{int(parts[1])}"
        if parts[0] == "norm":
            return "norm"
    for part in ("projector", "predictor"):
        if part in parts:
            return part
    raise ValueError(f"the tensor {name!r} belongs to no layer group.")
