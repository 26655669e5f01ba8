"""What an image is, and what is done to it on its way into a shard: checked, maybe shrunk."""

import io
from typing import Literal

from PIL import Image, ImageFile

from mocov3_ds.data.manifest import SAMPLE_LIMIT
from mocov3_ds.data.views import decode

Check = Literal["header", "decode"]

SUFFIXES = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "gif": "gif",
    "tif": "tif",
    "tiff": "tif",
    "ppm": "ppm",
    "pgm": "ppm",
    "pnm": "ppm",
}
"""Name endings (lower case) that make a file an image, and the member ending each gets."""

MAX_BYTES = SAMPLE_LIMIT
"""Largest image that is read, bytes."""

FAITHFUL_SIDE = 384
"""Shorter side, pixels, below which small crops lose sharpness (`mocov3_ds.bench resized`)."""

_LONGEST_JPEG = 65500
"""pixels that libjpeg writes in a row or column"""

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def checked_size(data: bytes, check: Check) -> tuple[int, int]:
    """Height and width of an image that training will be able to read.

    `header` reads the header and looks for the mark that ends a JPEG or PNG; only an image without
    it is decoded. That finds cut files, at a hundredth of the cost of decoding each one.

    Args:
        data: bytes of the stored image.
        check: how much is looked at.

    Raises:
        decode.UnreadableImage: with the reason.
    """
    height, width = decode.size_of(data)
    # some cameras and transfers pad with zeros
    whole = data.endswith((b"\xff\xd9", _PNG_END)) or data.rstrip(b"\0").endswith(b"\xff\xd9")
    if check == "decode" or not whole:
        decode.rgb(data)
    return height, width


def shrunk(data: bytes, shorter_side: int, quality: int, *, always: bool) -> bytes | None:
    """An image as a JPEG whose shorter side is at most so long.

    Antialiased (Lanczos), RGB, colour at full resolution (4:4:4): small crops of a later view lose
    least that way. Orientation marks and profiles are dropped as the reader drops them.

    Args:
        data: bytes of the stored image.
        shorter_side: pixels; larger images are shrunk to it.
        quality: of the JPEG, 1 to 100.
        always: encode again an image that is small enough, too (its size is kept).

    Returns:
        The JPEG, or None where the image stays as it is: small enough, or too long for a JPEG.

    Raises:
        decode.UnreadableImage: with the reason.
    """
    height, width = decode.size_of(data)
    short = min(height, width)
    if short <= shorter_side and not always:
        return None
    scale = min(1.0, shorter_side / short)
    tall, wide = (max(1, round(side * scale)) for side in (height, width))
    if max(tall, wide) > _LONGEST_JPEG:
        return None
    image = decode.rgb(data)
    if scale < 1:
        image = image.resize((wide, tall), Image.Resampling.LANCZOS)
    # Pillow's encoder fails on a buffer below the image's size when it optimises the code tables
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 4 * image.width * image.height)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()
