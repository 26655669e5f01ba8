"""Which grey is a number of a scanner? Pixels of more than 8 bits to bytes, by a stated rule.

Pillow clips such pixels at 255, so a 16-bit scan becomes white and a float image in 0 to 1 black.
Files seldom say which of their bits are used; the largest pixel does:

    integers  the depth is the least of 8, 10, 12, 14 and 16 bits that holds the largest pixel, and
              the upper 8 of its bits are kept: a scan of 12 bits stays one in any container
    floats    up to 1: of 1; up to 255: of 255; up to 65535: of 65535
    PPM       its header names the largest value, which is white
    arrays    the same rules, all channels of an image together; bytes stay as they are
    others    negative, beyond 16 bits, not finite: refused, as no range is stated

Of colour images of 16 bits Pillow hands on the upper byte alone. Where that byte never exceeds 15,
12 bits or fewer were used and little is left: refused.

Shape suffixes: H W = image, C = channels.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

_DEPTHS = (8, 10, 12, 14, 16)
_DIM = 15


def load_bytes(image: ImageFile.ImageFile) -> NDArray[np.uint8] | None:
    """Load an image; its grey levels where its pixels have more than 8 bits.

    Args:
        image: Opened image that is not loaded yet.

    Returns:
        (H, W) uint8, or None where the loaded image's pixels are bytes.

    Raises:
        ValueError: The pixels have no range that could be told.
    """
    deep_colours = image.mode in ("RGB", "RGBA") and ";16" in f"{image.tile}"
    image.load()
    if image.mode == "F":
        return _scale_floats(np.asarray(image))
    if image.mode == "I" or image.mode.startswith("I;16"):
        # the header of a PPM names its largest value, and Pillow has scaled that to 65535
        return _scale_integers(np.asarray(image), (16,) if image.format == "PPM" else _DEPTHS)
    if deep_colours and np.asarray(image)[:, :, :3].max() <= _DIM:
        raise ValueError(
            "colours of 16 bits that use 12 of them or fewer: only the upper 8 can be read here, "
            "and the image would be black; scale it to 8 bits"
        )
    return None


def scale_array(pixels_HWC: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bytes of an array of numbers, (H, W, C).

    Raises:
        ValueError: The pixels have no range that could be told.
    """
    if pixels_HWC.dtype == np.uint8:
        return pixels_HWC.view(np.uint8)
    if pixels_HWC.dtype.kind == "f":
        return _scale_floats(pixels_HWC.astype(np.float32))
    return _scale_integers(pixels_HWC.astype(np.int64))


def _scale_floats(levels_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(levels_HW.min()), float(levels_HW.max())
    if not (low >= 0 and high <= 65535):  # also where one of them is no number
        raise ValueError(
            f"floating-point pixels from {low:g} to {high:g}: 0 to 1, 255 or 65535 can be read"
        )
    full = next(top for top in (1, 255, 65535) if high <= top)
    return np.round(levels_HW * (255 / full)).astype(np.uint8)


def _scale_integers(
    levels_HW: NDArray[np.integer], depths: tuple[int, ...] = _DEPTHS
) -> NDArray[np.uint8]:
    low, high = int(levels_HW.min()), int(levels_HW.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels from {low} to {high}: 0 to 65535 can be read")
    depth = next(bits for bits in depths if high < 1 << bits)
    return (levels_HW >> (depth - 8)).astype(np.uint8)
