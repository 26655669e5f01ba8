"""Sizes and kinds of a network as plain values: settings and planner know them without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

Positions = Literal["sincos", "none"]

LARGEST_SIDE = 16384
"""Longest side of an image, pixels."""
LARGEST_SCALE = 64.0
"""longest side of a patch over that of a stored one"""

_SNAP_PIXELS, _SNAP_SHARE = 1e-3, 6e-6
"""how far the side of a larger patch may be from whole pixels: in pixels, and as a share of it, as
six digits of a scale leave it"""


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """Size of a Vision Transformer; the MLP is four times as wide as the embedding."""

    image_size: int = 224
    """side of an image, pixels; its height where `image_width` is another"""
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    image_width: int = 0
    """width of an image, pixels; 0 = a square"""
    channels: int = 3
    """colours or other channels of an image"""
    stem: Literal["patch", "conv"] = "patch"
    """what makes tokens of an image: one projection of each patch, or convolutions of stride 2
    (arXiv 2106.14881)"""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, pixels."""
        return self.image_size, self.image_width or self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size


def parse_size(size: int | str) -> tuple[int, int]:
    """Height and width that a setting means: the side of a square, or "HEIGHTxWIDTH".

    Args:
        size: pixels, such as 224 or "192x256".

    Raises:
        ValueError: it is neither.
    """
    sides = [size] if isinstance(size, int) else size.split("x")
    try:
        height, width = (int(side) for side in (sides * 2 if len(sides) == 1 else sides))
    except ValueError:
        height = width = 0
    if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
        raise ValueError(
            f"image size {size!r} cannot be: write the side of a square (224) or HEIGHTxWIDTH "
            f"(192x256), each from 1 to {LARGEST_SIDE} pixels."
        )
    return height, width


def snap_scale(patch_size: int, scale: float) -> float:
    """The patch scale that makes patches of whole pixels, where a written one is as good as that.

    Scales such as 8 / 7 are written with few digits.

    Args:
        patch_size: side of a stored patch, pixels.
        scale: side of a patch over that of a stored one, as it was written.
    """
    return _whole_side(patch_size, scale) / patch_size or scale


def _whole_side(patch_size: int, scale: float) -> int:
    """Side of a larger patch, pixels; 0 where that is no whole number of them."""
    side = round(patch_size * scale)
    return side if abs(patch_size * scale - side) <= max(_SNAP_PIXELS, _SNAP_SHARE * side) else 0


def scaled_grid(size: tuple[int, int], patch_size: int, scale: float = 1.0) -> tuple[int, int]:
    """Rows and columns of patches whose side is `scale` times as long as the stored ones'.

    Args:
        size: height and width of an image, pixels.
        patch_size: side of a stored patch, pixels.
        scale: side of a patch over that of a stored one, 1 or more; see `snap_scale`.

    Raises:
        ValueError: such patches have no whole pixels, or do not fill the image.
    """
    side = _whole_side(patch_size, scale)
    if not side or any(length % side for length in size):
        longest = min(*size, int(patch_size * LARGEST_SCALE))
        possible = [
            f"{larger / patch_size:g}"
            for larger in range(patch_size, longest + 1)
            if not any(length % larger for length in size)
        ]
        raise ValueError(
            f"the patch scale {scale:g} makes patches of {patch_size * scale:g} pixels, which do "
            f"not divide an image of {write_size(size)}; possible scales are "
            f"{', '.join(possible) or 'none'}."
        )
    return size[0] // side, size[1] // side


def write_size(size: tuple[int, int]) -> int | str:
    """Height and width as a user gives them: 224 for a square, else "192x256"."""
    height, width = size
    return height if height == width else f"{height}x{width}"


# Table 2 of the paper; ViT-S has 12 heads there (6 in DeiT).
PAPER_SHAPES = {
    "vit_s16": VitShape(dim=384, depth=12, heads=12),
    "vit_b16": VitShape(dim=768, depth=12, heads=12),
    "vit_l16": VitShape(dim=1024, depth=24, heads=16),
    "vit_h14": VitShape(patch_size=14, dim=1280, depth=32, heads=16),
}
# vits.py of the published MoCo v3 code: the convolutions stand for one block
CONV_STEM_SHAPES = {
    "vit_conv_s16": VitShape(dim=384, depth=11, heads=12, stem="conv"),
    "vit_conv_b16": VitShape(dim=768, depth=11, heads=12, stem="conv"),
}


@dataclass(frozen=True, kw_only=True)
class TimmShape:
    """A model of timm by name, without its classifier."""

    name: str
    """as `timm.create_model` takes it, such as "resnet50" """
    size: tuple[int, int] = (224, 224)
    """height and width of an image, pixels"""
    channels: int = 3
    """colours or other channels of an image"""
    arguments: tuple[str, ...] = ()
    """keywords of the model, each as "key=value" """


@dataclass(frozen=True, kw_only=True)
class OwnShape:
    """A network of one's own."""

    name: str
    make: Callable[[], "nn.Module"]
    """makes the network, (B, C, H, W) -> features (B, D), with weights of its own each time"""
    size: tuple[int, int] = (224, 224)
    """height and width of an image, pixels"""
    channels: int = 3
    """colours or other channels of an image"""


BackboneShape = VitShape | TimmShape | OwnShape
"""what a backbone is built from, see `backbones.build_backbone`"""


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """All that fixes the architecture of base and momentum encoder; see `vit.build_vit`."""

    backbone: BackboneShape
    hidden: int = 4096
    """hidden width of projector and predictor"""
    out: int = 256
    """width of queries and keys"""
    projector_layers: int = 3
    """linear layers of the projector"""
    predictor_norm: bool = True
    """whether a batch norm follows the last layer of the predictor"""
    positions: Positions = "sincos"
    train_patch_projection: bool = False
    drop_path: float = 0.0
    """stochastic depth rate of the base encoder's last block; the momentum encoder has none"""
    qk_norm: bool = False
    layer_scale: float = 0.0
    """first value of the factors on the branches of each block; 0 = there are none"""
    sigma_reparam: bool = False
    """whether the linear layers of the blocks have a learned largest singular value"""
    fp8: bool = False
    """whether the linear layers of the blocks multiply in fp8 in a network of bf16"""

    @property
    def vit(self) -> VitShape:
        """Shape of the backbone, where it is one of our Vision Transformers.

        Raises:
            ValueError: it is another network.
        """
        if not isinstance(self.backbone, VitShape):
            raise ValueError(
                f"the backbone {self.backbone.name} is none of the Vision Transformers of this "
                "program, whose sizes are known without building them."
            )
        return self.backbone
