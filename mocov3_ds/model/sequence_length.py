"""Which Vision Transformers can work on a part of their patches, and how a pass does it.

Shape suffixes: b = images of a pass, K = patches that are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mocov3_ds.model.patch_scale import ScalableVit, make_scalable, set_scale
from mocov3_ds.model.token_dropout import TokenDropout


def allow_shorter(backbone: nn.Module) -> None:
    """Let a Vision Transformer leave patches out, and use larger ones, where it is timm's.

    It must be timm's in how it goes from patches to features; any other network stays as it is.
    Names, weights and results of a pass over the whole sequence stay.

    Args:
        backbone: network that is changed in place.
    """
    own_way = getattr(type(backbone), "forward_features", None)
    if own_way is not VisionTransformer.forward_features:
        return
    assert isinstance(backbone, VisionTransformer)
    if isinstance(backbone.patch_drop, nn.Identity):
        backbone.add_module("patch_drop", TokenDropout(backbone.num_prefix_tokens))
        make_scalable(backbone)


def count_patches(backbone: nn.Module) -> int:
    """Patches of an image, of which some may be left out; 0 where the network cannot do that."""
    if not isinstance(getattr(backbone, "patch_drop", None), TokenDropout):
        return 0
    assert isinstance(backbone, VisionTransformer)
    return int(backbone.patch_embed.num_patches)


def scalable_patch_size(backbone: nn.Module) -> int:
    """Side of a patch, pixels, where patches may be larger; 0 where they may not."""
    return int(backbone.patch_embed.patch_size[0]) if isinstance(backbone, ScalableVit) else 0


@contextmanager
def shortened(
    backbone: nn.Module, kept_bK: Tensor | None = None, patch_scale: float = 1.0
) -> Iterator[None]:
    """Within, the backbone sees some patches of each image, or larger ones.

    Args:
        backbone: as `allow_shorter` changed it, or any where nothing is asked for.
        kept_bK: places of the patches that each image keeps; None = all.
        patch_scale: side of a patch over that of the whole sequence.
    """
    if kept_bK is None and patch_scale == 1:
        yield
        return
    dropout = getattr(backbone, "patch_drop", None)
    assert isinstance(dropout, TokenDropout)
    try:
        if patch_scale != 1:
            set_scale(backbone, patch_scale)
        dropout.kept_bK = kept_bK
        yield
    finally:
        dropout.kept_bK = None
        if patch_scale != 1:
            set_scale(backbone, 1.0)
