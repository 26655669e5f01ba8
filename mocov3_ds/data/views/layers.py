"""Which channels of an image are wanted? RGB and grey are made of any image, others must be there.

A layer is a Pillow image that is resized as a whole: one in RGB, or a grey one for each channel.

Shape suffixes: C H W = image.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STRIP = 8
"""channels of an image that a picture for the eye shows beside one another"""


class OtherChannels(ValueError):  # noqa: N818 - it says what the image has
    """An image has not the channels that are wanted."""


def from_image(image: Image.Image, channels: int) -> list[Image.Image]:
    """Layers of a loaded image, whose pixels are bytes.

    Args:
        image: Image as Pillow loaded it.
        channels: Channels that are wanted; 0 = those that it has.

    Raises:
        OtherChannels: It has others.
    """
    if channels in (1, 3):
        mode = "L" if channels == 1 else "RGB"
        image.info.pop("transparency", None)  # dropped in any case; Pillow warns about some kinds
        return [image if image.mode == mode else image.convert(mode)]
    if image.mode in ("1", "P", "PA"):  # bits and palettes: what they stand for
        has_alpha = image.mode == "PA" or "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
    bands = list(image.split())
    if channels not in (0, len(bands)):
        raise OtherChannels(f"{len(bands)} channels ({image.mode}) where {channels} are wanted")
    return bands


def from_planes(planes: Sequence[Image.Image], channels: int) -> list[Image.Image]:
    """Layers of an image that is stored as one grey image for each channel.

    Args:
        planes: Grey images of one size, in the order of the channels.
        channels: Channels that are wanted; 0 = those that it has.

    Raises:
        OtherChannels: It has others.
    """
    if channels in (1, 3) and len(planes) in (1, 3):
        joined = planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
        return from_image(joined, channels)
    if channels not in (0, len(planes)):
        raise OtherChannels(f"{len(planes)} channels where {channels} are wanted")
    return [*planes]


def stack_layers(layers: Iterable[Image.Image]) -> NDArray[np.uint8]:
    """All channels of the layers, (C, H, W) uint8."""
    pixels = [np.atleast_3d(np.asarray(layer)) for layer in layers]
    return np.ascontiguousarray(np.concatenate(pixels, axis=2).transpose(2, 0, 1))


def as_picture(pixels_CHW: NDArray[np.uint8]) -> Image.Image:
    """Pixels as people see them, in RGB: the first three channels, or the first one in grey.

    Args:
        pixels_CHW: uint8 pixels of any number of channels.
    """
    shown_CHW = pixels_CHW[: 3 if len(pixels_CHW) >= 3 else 1]
    shown_CHW = np.broadcast_to(shown_CHW, (3, *shown_CHW.shape[1:]))
    return Image.fromarray(np.ascontiguousarray(shown_CHW.transpose(1, 2, 0)))


def as_strip(pixels_CHW: NDArray[np.uint8]) -> Image.Image:
    """All pixels of an image for the eye: in colour or grey, else its channels beside one another.

    Args:
        pixels_CHW: uint8 pixels; of more than `STRIP` channels the first ones are shown.

    Returns:
        A picture in RGB, as wide as `strip_width` says.
    """
    if len(pixels_CHW) in (1, 3):
        return as_picture(pixels_CHW)
    shown_CHW = pixels_CHW[:STRIP]
    count, height, width = shown_CHW.shape
    strip = Image.new("RGB", (strip_width(count, width), height), "white")
    for number, pixels_HW in enumerate(shown_CHW):
        strip.paste(Image.fromarray(pixels_HW), (number * (width + 1), 0))
    return strip


def strip_width(channels: int, width: int) -> int:
    """Width in pixels of what `as_strip` makes of an image of so many channels and pixels."""
    count = 1 if channels in (1, 3) else min(channels, STRIP)
    return count * (width + 1) - 1
