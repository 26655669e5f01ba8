"""What is an image, and what is done to it on its way into a shard? It is checked, maybe shrunk."""

import io
from collections.abc import Sequence
from typing import Literal, cast

from PIL import Image, ImageFile

from mocov3_ds.data.manifest import SAMPLE_LIMIT
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.array_file import is_array

Check = Literal["header", "decode"]

SUFFIXES = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "jfif": "jpg",
    "jpe": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "gif": "gif",
    "tif": "tif",
    "tiff": "tif",
    "ppm": "ppm",
    "pgm": "ppm",
    "pnm": "ppm",
    **({"avif": "avif"} if "AVIF" in decode.FORMATS else {}),
    **({"heic": "heic", "heif": "heic"} if "HEIF" in decode.FORMATS else {}),
    **({"jxl": "jxl"} if "JXL" in decode.FORMATS else {}),
}
"""Name endings (lower case) that make a file an image, and the member ending each gets."""

ARRAY = "npy"
"""Ending of a NumPy array, which is the image of a WebDataset sample that has no other; elsewhere
such files hold too many other things."""

MAX_BYTES = SAMPLE_LIMIT
"""Largest image that is read, bytes."""

FAITHFUL_SIDE = 384
"""Shorter side, pixels, below which small crops lose sharpness (`mocov3_ds.bench resized`)."""

FAINT_RANGE = 16
"""Levels of 255 between the darkest and the brightest pixel, below which an image shows nothing"""

_LONGEST_JPEG = 65500
"""pixels that libjpeg writes in a row or column"""

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def checked_size(image_bytes: bytes, check: Check) -> tuple[int, int]:
    """Check that training will be able to read an image; returns its height and width in pixels.

    `header` reads the header and looks for the mark that ends a JPEG or PNG; only an image without
    it is decoded. That finds cut files, at a hundredth of the cost of decoding each one.

    Args:
        image_bytes: Bytes of the stored image.
        check: How much of the image is looked at.

    Raises:
        decode.UnreadableImage: The image cannot be read, with the reason.
    """
    height, width = decode.read_size(image_bytes)
    # some cameras and transfers pad with zeros
    jpeg_end = b"\xff\xd9"
    has_end = image_bytes.endswith((jpeg_end, _PNG_END))
    has_end = has_end or image_bytes.rstrip(b"\0").endswith(jpeg_end)
    if check == "decode" or not has_end:
        decode_stored(image_bytes)
    return height, width


def decode_stored(image_bytes: bytes) -> list[Image.Image]:
    """Decode an image: one in RGB, or a grey one for each channel of an array.

    Args:
        image_bytes: Bytes of the stored image.

    Raises:
        decode.UnreadableImage: The image cannot be read, with the reason.
    """
    return decode.decode_layers(image_bytes, 0 if is_array(image_bytes) else 3)


def is_faint(layers: Sequence[Image.Image]) -> bool:
    """Whether an image is nearly of one colour, as scans are whose pixels were scaled wrongly.

    Args:
        layers: Decoded image, RGB of 8 bits, or a grey one for each channel.
    """
    if len(layers) > 1:
        return all(is_faint([layer]) for layer in layers)
    extrema = layers[0].getextrema()
    bands = cast("Sequence[tuple[int, int]]", extrema if layers[0].mode == "RGB" else [extrema])
    return all(high - low < FAINT_RANGE for low, high in bands)


def shrink_image(
    image_bytes: bytes, shorter_side: int, quality: int, *, always: bool
) -> bytes | None:
    """Write an image as a JPEG whose shorter side has at most `shorter_side` pixels.

    Antialiased (Lanczos), RGB, colour at full resolution (4:4:4): small crops of a later view lose
    least that way. Orientation marks and profiles are dropped as the reader drops them.

    Args:
        image_bytes: Bytes of the stored image.
        shorter_side: Pixels that the shorter side of larger images gets.
        quality: Quality of the JPEG, 1 to 100.
        always: Encode again an image that is small enough, too (its size is kept).

    Returns:
        The JPEG, or None where the image stays as it is: small enough, too long for a JPEG, or an
        array.

    Raises:
        decode.UnreadableImage: The image cannot be read, with the reason.
    """
    if is_array(image_bytes):
        return None
    height, width = decode.read_size(image_bytes)
    short = min(height, width)
    if short <= shorter_side and not always:
        return None
    scale = min(1.0, shorter_side / short)
    tall, wide = (max(1, round(side * scale)) for side in (height, width))
    if max(tall, wide) > _LONGEST_JPEG:
        return None
    image = decode.decode_rgb(image_bytes)
    if scale < 1:
        image = image.resize((wide, tall), Image.Resampling.LANCZOS)
    # Pillow's encoder fails on a buffer below the image's size when it optimises the code tables
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 4 * image.width * image.height)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()
