"""Stored bytes to uint8 crops: one decode for both views, antialiased bilinear, (C, H, W).

    tar member -> two_crops (training, boxes from views.draw) or centre_crop (evaluation)

The pixels are those of torchvision on Pillow images: RandomResizedCrop, and Resize with CenterCrop.
Every stored kind becomes RGB as Pillow converts it (grey repeated, CMYK by its formula, alpha
dropped, palettes looked up, EXIF rotation not applied, as the reference loader does), but 16-bit
grey is scaled to 8 bits where Pillow would clip it to white.

Three decoders have this one interface, and `backend` says which runs: the first of them that is
there, or the one that the environment variable MOCOV3_DS_DECODER names.

    native      the extension, on Pillow's own libjpeg-turbo: the same pixels, bit for bit
    simplejpeg  wheels only: simplejpeg decodes, torch resizes; differs by at most 2 of 255
    pillow      always there

Whatever the first two do not take (other formats, CMYK, damaged data) goes to Pillow, whose word on
what is readable is final.

Shape suffixes: V = the two views, C H W = crop.
"""

import io
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mocov3_ds.data.views import native

Backend = Literal["native", "simplejpeg", "pillow"]
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
    if backend() == "native" and (found := native.size_of(data, MAX_PIXELS)):
        return found
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
    if backend() == "native":
        if _native_crops(data, boxes, flips, out):
            return
    elif backend() == "simplejpeg" and _simplejpeg_crops(data, boxes, flips, out):
        return
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
    if backend() == "native" and (found := native.size_of(data, MAX_PIXELS)):
        resized, corner = _centre(*found, size, resize)
        view_CHW = np.empty((3, size, size), np.uint8)
        if native.window(data, found, resized, corner, view_CHW, MAX_PIXELS) == native.READ:
            return view_CHW
    image = rgb(data)
    (height, width), (top, left) = _centre(image.height, image.width, size, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def backend() -> Backend:
    """Name of the decoder that runs here.

    Raises:
        ValueError: MOCOV3_DS_DECODER names one that is not there.
    """
    return _choice()[0]


def about() -> str:
    """The decoder that runs here and why not a faster one, for a log."""
    name, missed = _choice()
    return name + "".join(f"; not {missing}" for missing in missed)


@cache
def _choice() -> tuple[Backend, tuple[str, ...]]:
    """The first decoder that is there, and why those before it are not."""
    wanted = os.environ.get("MOCOV3_DS_DECODER", "")
    names: tuple[Backend, ...] = ("native", "simplejpeg", "pillow")
    if wanted and wanted not in names:
        raise ValueError(f"MOCOV3_DS_DECODER={wanted} is none of {', '.join(names)}.")
    missed: list[str] = []
    for name in names:
        if wanted and name != wanted:
            continue
        absent = _absence(name)
        if not absent:
            return name, tuple(missed)
        missed.append(f"{name}: {absent}")
    raise ValueError(
        f"MOCOV3_DS_DECODER={wanted} cannot run: {missed[0].partition(': ')[2]}; unset the "
        "variable to take what is there."
    )


def _absence(name: Backend) -> str:
    """Why a decoder cannot run here; empty = it can."""
    if name == "native":
        try:
            native.library()
        except RuntimeError as error:
            return f"{error}"
    if name == "simplejpeg" and find_spec("simplejpeg") is None:
        return "the package simplejpeg is not installed"
    return ""


def _centre(
    height: int, width: int, size: int, resize: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width after the resize of a centre crop, and the crop's top left corner there."""
    short, long = sorted((height, width))
    scaled = (int(resize * long / short), resize)
    tall, wide = scaled if width <= height else scaled[::-1]
    return (tall, wide), (round((tall - size) / 2), round((wide - size) / 2))


def _native_crops(
    data: bytes, boxes: Sequence[Box], flips: Sequence[bool], out: NDArray[np.uint8]
) -> bool:
    """Whether the extension has made the crops."""
    rows_whole = out.strides[3] == 1
    written = out if rows_whole else np.empty(out.shape, np.uint8)
    if native.crops(data, boxes, flips, written, MAX_PIXELS) != native.READ:
        return False
    if not rows_whole:
        out[:] = written
    return True


def _simplejpeg_crops(
    data: bytes, boxes: Sequence[Box], flips: Sequence[bool], out: NDArray[np.uint8]
) -> bool:
    """Whether simplejpeg and torch have made the crops."""
    import simplejpeg
    import torch  # here: who only reads images is spared its start

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > MAX_PIXELS:
            return False
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # also for what is only a warning: Pillow decides
        return False
    image_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).unsqueeze(0)  # channels last: faster
    for (top, left, tall, wide), flip, view_CHW in zip(boxes, flips, out, strict=True):
        crop_1CHW = torch.nn.functional.interpolate(
            image_1CHW[:, :, top : top + tall, left : left + wide],
            size=view_CHW.shape[1:],
            mode="bilinear",
            antialias=True,
        )
        crop_CHW = crop_1CHW[0].numpy()
        view_CHW[:] = crop_CHW[:, :, ::-1] if flip else crop_CHW
    return True


def _open(data: bytes) -> Image.Image:
    """Read the header."""
    if not data:
        raise UnreadableImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"too many pixels: at most {MAX_PIXELS} are read") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    # A damaged header can raise almost anything in Pillow's readers.
    except Exception as error:
        raise UnreadableImage(f"damaged header: {_reason(error)}") from error
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UnreadableImage(
            f"too many pixels: {image.width} x {image.height}, at most {MAX_PIXELS} are read"
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
    # 16-bit grey; other 32-bit integers have no range of their own, and Pillow clips them at 255
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        deep = np.asarray(image)
        return Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # dropped in any case, and Pillow warns about some kinds
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{error}" or type(error).__name__
