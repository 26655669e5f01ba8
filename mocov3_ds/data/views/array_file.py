"""Which pixels does a NumPy array hold? Images of any number of channels, as `.npy` members.

Only the plain format is read: a header, then numbers, (H, W) or (H, W, C). Objects, which Python
would have to unpickle, are refused by their header alone.

Shape suffixes: H W = image, C = channels.
"""

import io
import warnings

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from mocov3_ds.data.views import pixel_depth

MAGIC = b"\x93NUMPY"
MOST_CHANNELS = 256


def is_array(image_bytes: bytes) -> bool:
    """Whether these are the bytes of a NumPy array."""
    return image_bytes.startswith(MAGIC)


def read_shape(image_bytes: bytes, max_pixels: int) -> tuple[int, int, int]:
    """Height, width and channels, from the header alone.

    Args:
        image_bytes: Bytes of the stored array.
        max_pixels: Pixels of three channels whose numbers are read at most.

    Raises:
        ValueError: It is no array of pixels, too large, or its bytes are cut off.
    """
    shape, dtype, offset = _read_header(image_bytes)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ValueError(f"an array of {dtype} holds no pixels: whole or floating-point numbers do")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an array of the shape {shape} is no image: (height, width, channels) is")
    height, width, channels = (*shape, 1)[:3]
    if channels > MOST_CHANNELS:
        raise ValueError(
            f"{channels} channels in the shape {shape}, at most {MOST_CHANNELS} are read; they must"
            " be the last axis"
        )
    if height * width * channels > 3 * max_pixels:
        raise ValueError(
            f"{width} x {height} pixels of {channels} channels, at most {3 * max_pixels} numbers "
            "are read"
        )
    needed = height * width * channels * dtype.itemsize
    if len(image_bytes) - offset < needed:
        raise ValueError(f"truncated array: {len(image_bytes) - offset} of {needed} bytes")
    return height, width, channels


def read_planes(image_bytes: bytes, max_pixels: int) -> list[Image.Image]:
    """Each channel as a grey image of bytes; `pixel_depth` says how numbers become bytes.

    Args:
        image_bytes: Bytes of the stored array.
        max_pixels: Pixels of three channels whose numbers are read at most.

    Raises:
        ValueError: See `read_shape`; or the numbers have no range that could be told.
    """
    shape = read_shape(image_bytes, max_pixels)
    array: NDArray[np.generic] = np.load(io.BytesIO(image_bytes), allow_pickle=False)
    pixels_HWC = pixel_depth.scale_array(array.reshape(shape))
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels_HWC, 2, 0)]


def _read_header(image_bytes: bytes) -> tuple[tuple[int, ...], np.dtype[np.generic], int]:
    """Shape, type and the place of the first number."""
    stream = io.BytesIO(image_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that Python 2 wrote
        version = npy.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(stream)
        else:
            raise ValueError(f"an array of format {version}: 1.0 and 2.0 are read")
    return shape, dtype, stream.tell()
