"""The compiled half of the data path: JPEG to crops, draws and photometric work on the CPU.

A plain shared library called through ctypes: it needs no Python header to build, and ctypes lets
other threads run during a call. It decodes with the libjpeg-turbo that Pillow brought, so that its
pixels are Pillow's, bit for bit; before it is used it must prove that on a small image.
"""

import ctypes
import importlib.machinery
import io
import sys
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from mocov3_ds.data.views.photometric import ViewSpec

Box = tuple[int, int, int, int]

READ = 0
"""verdict: done. Any other one means: not for this code, let Pillow read the image or refuse it"""
_MASK = (1 << 64) - 1
_opening = threading.Lock()  # a thread that comes second must not open it again under the first
_NOT_BUILT = "the extension was not built (no C++ compiler when the package was installed)"


class Crop(ctypes.Structure):
    """One crop: a box of the image resized to out_height x out_width, and the window kept of it."""

    _fields_ = (
        *((name, c_int) for name in ("top", "left", "height", "width", "out_height", "out_width")),
        *((name, c_int) for name in ("window_top", "window_left", "size", "flip")),
        ("plane", c_int64),
        ("row", c_int64),
        ("out", c_void_p),
    )


class Spec(ctypes.Structure):
    """ViewSpec as the library reads it."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("crop_min", "crop_max", "brightness", "contrast")),
        *((name, ctypes.c_double) for name in ("saturation", "hue", "jitter_p", "grey_p")),
        *((name, ctypes.c_double * 2) for name in ("blur_p", "blur_sigma", "solarise_p")),
        ("flip_p", ctypes.c_double),
    )


@cache
def pack(spec: "ViewSpec") -> Spec:
    """The distribution of views for the library."""
    return Spec(*(getattr(spec, name) for name, *_ in Spec._fields_))


def library() -> ctypes.CDLL:
    """The library, its libjpeg opened and its pixels proven.

    Raises:
        RuntimeError: it cannot be used here; the message is the reason.
    """
    with _opening:
        return _opened()


@cache
def _opened() -> ctypes.CDLL:
    loaded = colour_library()
    tried = _libjpegs()
    for libjpeg in tried:
        if loaded.mocov3_open_library(libjpeg.encode(), _pillow_weighs_tall_rows_first()):
            for own_huffman in (True, False):
                loaded.mocov3_hook(own_huffman)
                difference = _difference_from_pillow(loaded)
                if difference == 0:
                    return loaded
            raise RuntimeError(
                f"decoding with {libjpeg} differs from Pillow by up to {difference} of 255"
            )
    raise RuntimeError(f"no libjpeg-turbo of ABI 62, 70 or 80 among {tried or 'no file'}")


@cache
def colour_library() -> ctypes.CDLL:
    """The library, for what needs no libjpeg.

    Raises:
        RuntimeError: it was not built or does not load.
    """
    here = Path(__file__).parent
    built = [here / f"_library{s}" for s in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in built if p.exists()), None)
    if path is None:
        raise RuntimeError(_NOT_BUILT)
    try:
        loaded = ctypes.CDLL(str(path))
        _declare(loaded)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path.name} does not load: {error}") from error
    return loaded


def ready() -> bool:
    """Whether `photometric` and `draw` can be called."""
    try:
        colour_library()
    except RuntimeError:
        return False
    return True


def crops(
    data: bytes,
    boxes: Sequence[Box],
    flips: Sequence[bool],
    out: NDArray[np.uint8],
    max_pixels: int,
) -> int:
    """`decode.two_crops` for plain JPEGs; rows of `out` contiguous. Returns the verdict."""
    view, plane, row, _ = out.strides
    size, start = out.shape[3], out.ctypes.data
    two = (Crop * 2)(
        *(
            Crop(*box, size, size, 0, 0, size, flip, plane, row, start + i * view)
            for i, (box, flip) in enumerate(zip(boxes, flips, strict=True))
        )
    )
    verdict: int = library().mocov3_crops(data, len(data), max_pixels, two, 2)
    return verdict


def window(
    data: bytes,
    height_width: tuple[int, int],
    resized: tuple[int, int],
    corner: tuple[int, int],
    out: NDArray[np.uint8],
    max_pixels: int,
) -> int:
    """Resize a whole image and keep the window of `out`'s size at `corner`. Returns the verdict."""
    _, plane, row = (0, *out.strides[:2])
    crop = Crop(
        0, 0, *height_width, *resized, *corner, out.shape[2], 0, plane, row, out.ctypes.data
    )
    verdict: int = library().mocov3_crops(data, len(data), max_pixels, ctypes.byref(crop), 1)
    return verdict


def size_of(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of a plain JPEG; None if Pillow must look."""
    found = (c_int * 2)()
    verdict = library().mocov3_size(data, len(data), max_pixels, found)
    return (found[0], found[1]) if verdict == READ else None


def pair(
    data: bytes,
    spec: "ViewSpec",
    key: tuple[int, int, int],
    out: NDArray[np.uint8],
    rows: NDArray[np.float32],
    max_pixels: int,
    augment: bool,
) -> int:
    """Draw the views of a sample (key: seed, epoch, sample) and crop them. Returns the verdict.

    Rows of `out` are contiguous; if `augment`, which also does the colour work, each view is.
    """
    seed, epoch, sample = (k & _MASK for k in key)
    verdict: int = library().mocov3_views(
        data,
        len(data),
        max_pixels,
        pack(spec),
        seed,
        epoch,
        sample,
        out.shape[3],
        out.ctypes.data,
        *out.strides[:3],
        rows.ctypes.data,
        augment,
    )
    return verdict


def draw(
    spec: "ViewSpec", key: tuple[int, int, int], height: int, width: int
) -> tuple[list[Box], list[bool], NDArray[np.float32]]:
    """`views.draw`."""
    boxes, flips = (c_int * 8)(), (c_int * 2)()
    rows = np.empty((2, 10), np.float32)
    colour_library().mocov3_draw(
        pack(spec), *(k & _MASK for k in key), height, width, boxes, flips, rows.ctypes.data
    )
    first = (boxes[0], boxes[1], boxes[2], boxes[3])
    second = (boxes[4], boxes[5], boxes[6], boxes[7])
    return [first, second], [bool(f) for f in flips], rows


def photometric(
    images_BCHW: NDArray[np.uint8],
    rows_BP: NDArray[np.float32],
    scale_C: NDArray[np.float32],
    shift_C: NDArray[np.float32],
    kind: Literal["float32", "bfloat16"],
    out: int,
) -> None:
    """Colour work, then scale and shift to `out`, an address; all arrays are contiguous."""
    count, _, height, width = images_BCHW.shape
    failed = colour_library().mocov3_photometric(
        images_BCHW.ctypes.data,
        rows_BP.ctypes.data,
        count,
        height,
        width,
        scale_C.ctypes.data,
        shift_C.ctypes.data,
        ("float32", "bfloat16").index(kind),
        out,
    )
    if failed:
        raise MemoryError


def augment(images_BCHW: NDArray[np.uint8], rows_BP: NDArray[np.float32]) -> None:
    """Colour work in place; both arrays are contiguous."""
    count, _, height, width = images_BCHW.shape
    arguments = (images_BCHW.ctypes.data, rows_BP.ctypes.data, count, height, width)
    if colour_library().mocov3_augment(*arguments):
        raise MemoryError


def _declare(loaded: ctypes.CDLL) -> None:
    """Argument types; ctypes checks each call against them."""
    image = (c_char_p, c_int64, c_int64)
    spec_and_key = (POINTER(Spec), c_uint64, c_uint64, c_uint64)
    loaded.mocov3_open_library.argtypes = (c_char_p, c_int)
    loaded.mocov3_hook.argtypes, loaded.mocov3_hook.restype = (c_int,), c_int64
    loaded.mocov3_crops.argtypes = (*image, POINTER(Crop), c_int)
    loaded.mocov3_size.argtypes = (*image, POINTER(c_int))
    strides = (c_int64,) * 3
    crops = (c_int, c_void_p, *strides)
    loaded.mocov3_views.argtypes = (*image, *spec_and_key, *crops, c_void_p, c_int)
    images = (c_void_p, c_void_p, c_int64, c_int, c_int)
    loaded.mocov3_augment.argtypes = images
    loaded.mocov3_photometric.argtypes = (*images, c_void_p, c_void_p, c_int, c_void_p)
    boxes_flips_rows = (POINTER(c_int), POINTER(c_int), c_void_p)
    loaded.mocov3_draw.argtypes = (*spec_and_key, c_int, c_int, *boxes_flips_rows)
    loaded.mocov3_draw.restype = None


def _libjpegs() -> list[str]:
    """Files to try: those that Pillow came with, then any other in this process (torchvision's)."""
    package = Path(Image.__file__).parent
    folders = [package.parent / "pillow.libs", package / ".dylibs", Path(sys.prefix) / "lib"]
    found: list[str] = []
    for folder in folders:
        found += sorted(str(p) for p in folder.glob("libjpeg*.so*"))
        found += sorted(str(p) for p in folder.glob("libjpeg*.dylib"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        files = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()]
        found += [f for f in files if Path(f).name.startswith("libjpeg")]
    return list(dict.fromkeys([*found, "libjpeg.so.62", "libjpeg.so.8"]))


def _pillow_weighs_tall_rows_first() -> bool:
    """Newer Pillows resize tall images rows first, and the rounding in between differs."""
    column = np.arange(300, dtype=np.uint32)[:, None] * 2_654_435_761 >> np.arange(9) * 3
    image = Image.fromarray((column & 255).astype(np.uint8))
    bilinear = Image.Resampling.BILINEAR
    columns_first = image.resize((20, 300), bilinear).resize((20, 20), bilinear)
    return image.resize((20, 20), bilinear).tobytes() != columns_first.tobytes()


def _difference_from_pillow(loaded: ctypes.CDLL) -> int:
    """Largest difference of a small chroma-subsampled image's crops; 256 = not decoded."""
    y, x = np.mgrid[:70, :90]
    pixels = np.stack([(x * 5 + y) % 256, (y * 7) % 256, (x * y) % 256], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=2)
    data, size = buffer.getvalue(), 33
    out = np.empty((3, size, size), np.uint8)
    largest = 0
    for top, left, height, width in ((0, 0, 70, 90), (13, 30, 50, 41)):
        crop = Crop(top, left, height, width, size, size, 0, 0, size, 0, size * size, size)
        crop.out = out.ctypes.data
        if loaded.mocov3_crops(data, len(data), 1 << 20, ctypes.byref(crop), 1) != READ:
            return 256
        image = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        gap = np.abs(expected.transpose(2, 0, 1).astype(int) - out)
        largest = max(largest, int(gap.max()))
    return largest
