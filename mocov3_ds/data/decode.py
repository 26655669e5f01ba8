"""Stored bytes to uint8 crops: one decode for both views, antialiased bilinear, (C, H, W).

    tar member -> two_crops (training, boxes from views.draw) or centre_crop (evaluation)

The pixels are those of torchvision on Pillow images: RandomResizedCrop, and Resize with CenterCrop.
Every stored kind becomes RGB as Pillow converts it (grey repeated, CMYK by its formula, alpha
dropped, palettes looked up, EXIF rotation not applied, as the reference loader does), but 16-bit
grey is scaled to 8 bits where Pillow would clip it to white.

Shape suffixes: V = the two views, C H W = crop.
"""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Box = tuple[int, int, int, int]

MAX_PIXELS = 89_478_485
"""Larger images are refused as decompression bombs; Pillow's own bound (256 MiB of RGB)."""

# Pillow also opens formats that run other programs (EPS) or that no data set holds.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class UnreadableImage(Exception):  # noqa: N818 - it says what the sample is; the stream counts it
    """The bytes of a sample cannot be turned into pixels; the message is the reason."""


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
        UnreadableImage: there is no readable header, or the image is beyond `MAX_PIXELS`.
    """
    with _open(data) as image:
        return image.height, image.width


def two_crops(
    data: bytes, boxes: Sequence[Box], flips: Sequence[bool], out: NDArray[np.uint8]
) -> None:
    """Decode an image once and write its two resized crops.

    Args:
        data: bytes of the stored image.
        boxes: of the two views: (top, left, height, width), pixels, inside the image.
        flips: mirror the view left to right.
        out: (2, 3, S, S) uint8, written; any strides.

    Raises:
        UnreadableImage: with the reason; `out` may be partly written.
    """
    image = rgb(data)
    for (top, left, height, width), flip, view_CHW in zip(boxes, flips, out, strict=True):
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize(view_CHW.shape[:0:-1], Image.Resampling.BILINEAR)
        crop_CHW = np.asarray(crop).transpose(2, 0, 1)
        view_CHW[:] = crop_CHW[:, :, ::-1] if flip else crop_CHW


def centre_crop(data: bytes, size: int, resize: int) -> NDArray[np.uint8]:
    """The view that evaluation uses: shorter side to `resize`, then the centre.

    Args:
        data: bytes of the stored image.
        size: side of the crop, pixels.
        resize: shorter side before the crop, pixels.

    Returns:
        (3, size, size) uint8.

    Raises:
        UnreadableImage: with the reason.
        ValueError: the crop is larger than the resized image.
    """
    if size > resize:
        raise ValueError(f"a centre crop of {size} pixels needs resize >= {size}, got {resize}.")
    image = rgb(data)
    short, long = sorted(image.size)
    scaled = (resize, int(resize * long / short))
    width, height = scaled if image.width <= image.height else scaled[::-1]
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def backend() -> str:
    """Name of the decoder that runs here."""
    return "pillow"


def _open(data: bytes) -> Image.Image:
    """Read the header."""
    if not data:
        raise UnreadableImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(str(error)) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    # A damaged header can raise almost anything in Pillow's readers.
    except Exception as error:
        raise UnreadableImage(f"damaged header: {_reason(error)}") from error
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are read"
        )
    return image


def rgb(data: bytes) -> Image.Image:
    """The whole image in RGB, as the views see it.

    Raises:
        UnreadableImage: with the reason.
    """
    with _open(data) as image:
        try:
            image.load()
            return _rgb(image)
        except MemoryError:
            raise
        except Exception as error:
            reason = _reason(error)
            kind = "truncated" if "truncated" in reason else "damaged"
            raise UnreadableImage(f"{kind} {image.format} data: {reason}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        deep = np.asarray(image)
        return Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # dropped in any case, and Pillow warns about some kinds
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{error}" or type(error).__name__
