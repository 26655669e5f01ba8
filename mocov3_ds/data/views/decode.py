"""Stored bytes to uint8 crops: one decode for both views, antialiased bilinear, (C, H, W).

    image bytes -> cut_crops (training, boxes from draw.draw_views) or centre_crop (evaluation)

The pixels are those of torchvision on Pillow images: RandomResizedCrop, and Resize with CenterCrop.
Every stored kind becomes RGB as Pillow converts it (grey repeated, CMYK by its formula, alpha
dropped, palettes looked up, EXIF rotation not applied, as the reference loader does), or grey where
one channel is asked for; pixels of more than 8 bits are scaled as `pixel_depth` says, where Pillow
would clip them. Other numbers of channels are those that an image has (RGBA, CMYK, grey with alpha,
a NumPy array): one that has others is unreadable.

What one image may cost is bounded: its pixels, the work of its scans, and its text.

Three decoders have this one interface. The first that can run is used, or the one that the
environment variable MOCOV3_DS_DECODER names.

    native      the C++ library, on Pillow's own libjpeg-turbo: the same pixels, bit for bit
    simplejpeg  wheels only: simplejpeg decodes, torch resizes; differs by at most 2 of 255
    pillow      always installed

Whatever the first two do not take (other formats, CMYK, damaged data) goes to Pillow, which alone
decides what is readable.

Shape suffixes: V = the two views, C H W = crop.
"""

import importlib
import io
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, features

from mocov3_ds.data.views import array_file, layers, native, pixel_depth
from mocov3_ds.data.views.spec import Box

Decoder = Literal["native", "simplejpeg", "pillow"]
Sides = tuple[int, int]
"""height and width, pixels"""

MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs, where Pillow itself raises: twice the size at
which it warns (512 MiB of RGB). Phones take photographs of 108 million pixels."""

MAX_SCAN_PIXELS = 1 << 30
"""A JPEG of more scans than `native.MAX_SCANS` is refused where scans x pixels exceed this: an
empty scan costs 0.3 ns a pixel, whatever few bytes it takes."""

MAX_PPM_PIXELS = 1 << 20
"""Larger PPM images of decimal text or odd scales are refused: Pillow reads number by number."""

# Settings of all Pillow's users in this process, as it has no others: its warning begins where we
# refuse, and the text of a PNG may fill what Pillow allows all texts of a file together.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Pillow also opens formats that run other programs (EPS) or that no data set holds.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read, by Pillow's names."""
if find_spec("PIL.AvifImagePlugin") and features.check("avif"):  # Pillow 11.3 and later
    FORMATS += ("AVIF",)
if find_spec("pillow_heif"):  # the photographs of phones; the extra "formats" brings both packages
    importlib.import_module("pillow_heif").register_heif_opener()
    FORMATS += ("HEIF",)
if find_spec("pillow_jxl"):
    importlib.import_module("pillow_jxl")
    FORMATS += ("JXL",)


class UnreadableImage(Exception):  # noqa: N818 - it says what the sample is; the loader counts it
    """The bytes of a sample cannot be turned into pixels; the message is the reason."""


def read_size(image_bytes: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
        UnreadableImage: There is no readable header, or the image is larger than `max_pixels`.
    """
    if current_decoder() == "native" and (size := native.read_size(image_bytes, max_pixels)):
        return size
    if array_file.is_array(image_bytes):
        try:
            return array_file.read_shape(image_bytes, max_pixels)[:2]
        except Exception as error:  # a damaged header can raise almost anything
            raise UnreadableImage(f"damaged array: {_describe_error(error)}") from error
    with _open(image_bytes, max_pixels) as image:
        return image.height, image.width


def cut_crops(
    image_bytes: bytes, boxes: Sequence[Box], flips: Sequence[bool], out_VCHW: NDArray[np.uint8]
) -> None:
    """Decode an image once and write its two resized crops.

    Args:
        image_bytes: Bytes of the stored image.
        boxes: Boxes of the two views, inside the image.
        flips: Whether to mirror each view left to right.
        out_VCHW: (2, C, H, W) uint8 that is written; any strides.

    Raises:
        UnreadableImage: The image cannot be read; `out_VCHW` may be partly written.
    """
    channels = out_VCHW.shape[1]
    decoder = current_decoder() if channels in (1, 3) else "pillow"
    if decoder == "native" and out_VCHW.strides[3] == 1:  # the library writes contiguous rows
        if native.cut_crops(image_bytes, boxes, flips, out_VCHW, MAX_PIXELS) == native.READ:
            return
    elif decoder == "simplejpeg" and _cut_by_simplejpeg(image_bytes, boxes, flips, out_VCHW):
        return
    image_layers = decode_layers(image_bytes, channels)
    for (y, x, height, width), flip, crop_CHW in zip(boxes, flips, out_VCHW, strict=True):
        box, (tall, wide) = (x, y, x + width, y + height), crop_CHW.shape[1:]
        resized_CHW = layers.stack_layers(
            layer.crop(box).resize((wide, tall), Image.Resampling.BILINEAR)
            for layer in image_layers
        )
        crop_CHW[:] = resized_CHW[:, :, ::-1] if flip else resized_CHW


def centre_crop(
    image_bytes: bytes, size: int | Sides, resize: int | Sides = 0, channels: int = 3
) -> NDArray[np.uint8]:
    """The crop that evaluation uses: the image resized until it covers `resize`, then the centre.

    For a square, that is the shorter side resized to that of `resize`.

    Args:
        image_bytes: Bytes of the stored image.
        size: Height and width of the crop in pixels, or the side of a square.
        resize: Height and width in pixels that the resized image has at least, or the side of a
            square; 0 = 256/224 of `size`.
        channels: Channels of the crop.

    Returns:
        The crop (channels, height, width), uint8.

    Raises:
        UnreadableImage: The image cannot be read.
        ValueError: The crop is larger than the resized image.
    """
    size = as_sides(size)
    resize = as_sides(resize or resize_for(size))
    if size[0] > resize[0] or size[1] > resize[1]:
        raise ValueError(
            f"a centre crop of {size[0]} x {size[1]} pixels needs resize >= {size[0]} x {size[1]}, "
            f"got {resize[0]} x {resize[1]}."
        )
    is_native = channels in (1, 3) and current_decoder() == "native"
    if is_native and (stored := native.read_size(image_bytes, MAX_PIXELS)):
        window = _centre_window(stored, size, resize)
        crop_CHW = np.empty((channels, *size), np.uint8)
        verdict = native.cut_window(image_bytes, stored, *window, crop_CHW, MAX_PIXELS)
        if verdict == native.READ:
            return crop_CHW
    return layers.stack_layers(
        _cut_centre(layer, size, resize) for layer in decode_layers(image_bytes, channels)
    )


def resize_for(size: Sides) -> Sides:
    """Height and width, pixels, that evaluation resizes an image to before it cuts `size`."""
    return round(size[0] * 256 / 224), round(size[1] * 256 / 224)


def decode_rgb(image_bytes: bytes) -> Image.Image:
    """The stored image in RGB at its full size, as the views see it.

    Raises:
        UnreadableImage: The image cannot be read.
    """
    (image,) = decode_layers(image_bytes, 3)
    return image


def decode_layers(image_bytes: bytes, channels: int) -> list[Image.Image]:
    """The stored image at its full size: one image in RGB or grey, else a grey one a channel.

    Args:
        image_bytes: Bytes of the stored image.
        channels: Channels that are wanted; 0 = those that the image has.

    Raises:
        UnreadableImage: The image cannot be read, or has other channels.
    """
    kind = "array"
    try:
        if array_file.is_array(image_bytes):
            return layers.from_planes(array_file.read_planes(image_bytes, MAX_PIXELS), channels)
        with _open(image_bytes, MAX_PIXELS) as image:
            kind = f"{image.format} data"
            levels_HW = pixel_depth.load_bytes(image)
            loaded = image if levels_HW is None else Image.fromarray(levels_HW)
            return layers.from_image(loaded, channels)
    except (MemoryError, UnreadableImage):
        raise
    except layers.OtherChannels as error:
        raise UnreadableImage(str(error)) from error
    except Exception as error:
        reason = _describe_error(error)
        damage = "truncated" if "truncated" in reason else "damaged"
        raise UnreadableImage(f"{damage} {kind}: {reason}") from error


# ------------------------------------------------------------------------------- the decoders


def current_decoder() -> Decoder:
    """Name of the decoder that this process uses; see `choose_decoder` for what is raised."""
    return choose_decoder(os.environ.get("MOCOV3_DS_DECODER", ""))[0]


def describe_decoder() -> str:
    """The decoder that this process uses and why not a faster one, for a log."""
    return choose_decoder(os.environ.get("MOCOV3_DS_DECODER", ""))[1]


def explain_absence(decoder: Decoder) -> str:
    """Why a decoder cannot run on this machine; empty if it can."""
    if decoder == "native":
        try:
            native.jpeg_library()
        except RuntimeError as error:
            return f"{error}"
    if decoder == "simplejpeg" and find_spec("simplejpeg") is None:
        return "the package simplejpeg is not installed"
    return ""


@cache
def choose_decoder(
    requested: str, explain: Callable[[Decoder], str] = explain_absence
) -> tuple[Decoder, str]:
    """The first decoder that can run, and a description that says why not those before it.

    Args:
        requested: Name of the one decoder that may be chosen; empty = the first that can run.
        explain: Function that says why a decoder cannot run, or nothing.

    Raises:
        ValueError: The requested decoder is unknown or cannot run.
    """
    names: tuple[Decoder, ...] = get_args(Decoder)
    if requested and requested not in names:
        raise ValueError(f"MOCOV3_DS_DECODER={requested} is none of {', '.join(names)}.")
    obstacles = ""
    for name in names:
        if requested and name != requested:
            continue
        obstacle = explain(name)
        if not obstacle:
            return name, name + obstacles
        obstacles += f"; not {name}: {obstacle}"
    raise ValueError(
        f"MOCOV3_DS_DECODER={requested} cannot run: {obstacles.partition(': ')[2]}; unset the "
        "variable to take what is there."
    )


def _cut_by_simplejpeg(
    image_bytes: bytes, boxes: Sequence[Box], flips: Sequence[bool], out_VCHW: NDArray[np.uint8]
) -> bool:
    """Whether simplejpeg and torch have made the crops."""
    if out_VCHW.shape[1] != 3:
        return False
    import simplejpeg
    import torch  # here: a process that only reads images need not wait for its import

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image_bytes)
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > MAX_PIXELS:
            return False
        if not _scans_are_bounded(image_bytes, height * width):
            return False
        pixels_HWC = simplejpeg.decode_jpeg(image_bytes, "RGB")
    except ValueError:  # also for what is only a warning: Pillow decides
        return False
    image_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)  # channels last: faster
    for (y, x, tall, wide), flip, crop_CHW in zip(boxes, flips, out_VCHW, strict=True):
        box_1CHW = image_CHW[None, :, y : y + tall, x : x + wide]
        resized_CHW = torch.nn.functional.interpolate(
            box_1CHW, size=crop_CHW.shape[1:], mode="bilinear", antialias=True
        )[0].numpy()
        crop_CHW[:] = resized_CHW[:, :, ::-1] if flip else resized_CHW
    return True


# ------------------------------------------------------------------------------------- details


def as_sides(size: int | Sides) -> Sides:
    """Height and width of a square, or of what is no square."""
    return (size, size) if isinstance(size, int) else size


def _centre_window(stored: Sides, size: Sides, resize: Sides) -> tuple[Sides, Sides]:
    """Height and width after the resize of a centre crop, and the crop's top left corner."""
    height, width = stored
    if width * resize[0] <= height * resize[1]:  # the width decides the scale
        tall, wide = int(resize[1] * height / width), resize[1]
    else:
        tall, wide = resize[0], int(resize[0] * width / height)
    return (tall, wide), (round((tall - size[0]) / 2), round((wide - size[1]) / 2))


def _cut_centre(image: Image.Image, size: Sides, resize: Sides) -> Image.Image:
    """The centre crop of a decoded image."""
    stored, (tall, wide) = (image.height, image.width), size
    (height, width), (y, x) = _centre_window(stored, size, resize)
    if height * width <= MAX_PIXELS:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return image.crop((x, y, x + wide, y + tall))
    # a strip, whose longer side would grow beyond all bounds: what is seen of it alone
    across, down = image.width / width, image.height / height
    box = (x * across, y * down, (x + wide) * across, (y + tall) * down)
    return image.resize((wide, tall), Image.Resampling.BILINEAR, box=box)


def _open(image_bytes: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header."""
    if not image_bytes:
        raise UnreadableImage("empty file")
    try:
        image = Image.open(io.BytesIO(image_bytes), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"too many pixels: at most {max_pixels} are read") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    # A damaged header can raise almost anything in Pillow's readers.
    except Exception as error:
        raise UnreadableImage(f"damaged header: {_describe_error(error)}") from error
    if not 0 < image.width * image.height <= max_pixels:
        raise UnreadableImage(
            f"too many pixels: {image.width} x {image.height}, at most {max_pixels} are read"
        )
    pixels, shape = image.width * image.height, f"{image.width} x {image.height} pixels"
    if image.format == "JPEG" and not _scans_are_bounded(image_bytes, pixels):
        raise UnreadableImage(
            f"too many scans: {_count_scans(image_bytes)} of {shape}, at most {native.MAX_SCANS} "
            "are read of an image of this size"
        )
    if pixels > MAX_PPM_PIXELS and image.tile and image.tile[0].codec_name.startswith("ppm"):
        raise UnreadableImage(
            f"too many pixels: {shape}, of which at most {MAX_PPM_PIXELS} are read of a PPM in "
            "decimal text or with another scale than 255 and 65535"
        )
    return image


def _count_scans(image_bytes: bytes) -> int:
    """Scans of a JPEG; those of a thumbnail inside it count, too."""
    return image_bytes.count(b"\xff\xda")


def _scans_are_bounded(image_bytes: bytes, pixels: int) -> bool:
    """Whether decoding a JPEG goes through its pixels a bounded number of times."""
    scans = _count_scans(image_bytes)
    return scans <= native.MAX_SCANS or scans * pixels <= MAX_SCAN_PIXELS


def _describe_error(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
