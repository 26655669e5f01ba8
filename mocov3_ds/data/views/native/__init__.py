"""The compiled half of the data path: JPEG to crops, and colour work on the CPU.

A plain shared library called through ctypes: it needs no Python header to build, and ctypes lets
other threads run during a call. It decodes with the libjpeg-turbo that Pillow brought, so that its
pixels are Pillow's, bit for bit; before it is used it must prove that on a small image. The layout
of parameter rows and structures must be the one that this code knows: a library that was built from
other sources is refused.

Functions that read an image return a verdict of the library: `READ`, or any other number where the
image is not for this code. Then Pillow reads it or says what is wrong with it.
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

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocov3_ds.data.views.spec import ATTEMPTS, ORDERS, PARAMETERS, Box, Column, Purpose, ViewSpec
from mocov3_ds.settings.comparison import differences

READ = 0
"""verdict of an image that was read"""
FLOAT32, BFLOAT16 = 0, 1
"""types of views that `make_views` can write"""
LAYOUT_VERSION = 2
"""raised, here and in crops.cpp, when a function of the library takes or returns something else"""
MAX_SCANS = 32
"""scans of a JPEG that are read without a question; encoders write about ten"""
_opening = threading.Lock()  # a thread that comes second must not open it again under the first
_NOT_BUILT = "the extension was not built (no C++ compiler when the package was installed)"


class Crop(ctypes.Structure):
    """One crop: a box of the image resized to out_height x out_width, and a window of that."""

    _fields_ = (
        *((name, c_int) for name in ("top", "left", "height", "width", "out_height", "out_width")),
        *((name, c_int) for name in ("window_top", "window_left", "tall", "wide")),
        *((name, c_int) for name in ("flip", "channels")),
        ("plane", c_int64),
        ("row", c_int64),
        ("out", c_void_p),
    )


class Spec(ctypes.Structure):
    """The fields of ViewSpec that the library draws from."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("crop_min", "crop_max", "brightness", "contrast")),
        *((name, ctypes.c_double) for name in ("saturation", "hue", "jitter_p", "grey_p")),
        *((name, ctypes.c_double * 2) for name in ("blur_p", "blur_sigma", "solarise_p")),
        ("flip_p", ctypes.c_double),
        *((name, ctypes.c_double * 2) for name in ("aspect", "log_aspect")),
        ("solarise_threshold", ctypes.c_double),
    )


# ------------------------------------------------------------------------ loading the library


def load_library(folder: Path) -> ctypes.CDLL:
    """Load the library of a folder and check that it was built from the present sources.

    Raises:
        RuntimeError: There is no library, or it does not load on this machine.
        ValueError: It was built from other sources than this code belongs to.
    """
    candidates = [folder / f"_library{s}" for s in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise RuntimeError(_NOT_BUILT)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path.name} does not load: {error}") from error
    layout = _read_layout(loaded)
    difference = next(differences(layout, expected_layout()), None) if layout else "it is older"
    if difference is not None:
        raise ValueError(
            f"{path} was built from other C++ sources ({difference}); build it again: "
            "pip install -e ."
        )
    _declare_arguments(loaded)
    return loaded


@cache
def colour_library() -> ctypes.CDLL:
    """The library for what needs no libjpeg; see `load_library` for what is raised."""
    return load_library(Path(__file__).parent)


def jpeg_library() -> ctypes.CDLL:
    """The library with its libjpeg opened and its pixels proven.

    Raises:
        RuntimeError: It cannot be used on this machine; the message is the reason.
        ValueError: It was built from other sources than this code belongs to.
    """
    with _opening:
        return open_jpeg_library()


@cache
def open_jpeg_library() -> ctypes.CDLL:
    """What `jpeg_library` does on its first call, for one thread at a time."""
    loaded = colour_library()
    candidates = find_libjpegs()
    for libjpeg in candidates:
        if loaded.mocov3_open_libjpeg(libjpeg.encode(), _pillow_weighs_tall_rows_first()):
            for own_huffman in (True, False):
                loaded.mocov3_use_own_huffman(own_huffman)
                difference = _difference_from_pillow(loaded)
                if difference == 0:
                    return loaded
            raise RuntimeError(
                f"decoding with {libjpeg} differs from Pillow by up to {difference} of 255"
            )
    raise RuntimeError(f"no libjpeg-turbo of ABI 62, 70 or 80 among {candidates or 'no file'}")


def is_built() -> bool:
    """Whether `make_views` and `augment_crops` can be called.

    Raises:
        ValueError: The library was built from other sources than this code belongs to.
    """
    try:
        colour_library()
    except RuntimeError:
        return False
    return True


def expected_layout() -> dict[str, int]:
    """Every number that this code and the library must agree on, by name."""
    layout = {
        "LAYOUT_VERSION": LAYOUT_VERSION,
        "MAX_SCANS": MAX_SCANS,
        "PARAMETERS": PARAMETERS,
        "ATTEMPTS": ATTEMPTS,
        "ORDER_COUNT": len(ORDERS),
        **{member.name: member.value for member in (*Column, *Purpose)},
    }
    for structure in (Spec, Crop):
        layout[f"sizeof {structure.__name__}"] = ctypes.sizeof(structure)
        for name, *_ in structure._fields_:
            layout[f"{structure.__name__}.{name}"] = getattr(structure, name).offset
    return layout


def _read_layout(loaded: ctypes.CDLL) -> dict[str, int]:
    """What the library says of the same numbers; empty if it is so old that it says nothing."""
    if not hasattr(loaded, "mocov3_layout"):
        return {}
    loaded.mocov3_layout.argtypes = (c_int, POINTER(c_int))
    loaded.mocov3_layout.restype = c_char_p
    layout: dict[str, int] = {}
    value = c_int()
    while name := loaded.mocov3_layout(len(layout), value):
        layout[name.decode()] = value.value
    return layout


def _declare_arguments(loaded: ctypes.CDLL) -> None:
    """Set the argument types, against which ctypes checks each call."""
    image, strides = (c_char_p, c_int64, c_int64), (c_int64,) * 3
    loaded.mocov3_open_libjpeg.argtypes = (c_char_p, c_int)
    loaded.mocov3_use_own_huffman.argtypes = (c_int,)
    loaded.mocov3_use_own_huffman.restype = c_int64
    loaded.mocov3_cut_crops.argtypes = (*image, POINTER(Crop), c_int)
    loaded.mocov3_read_size.argtypes = (*image, POINTER(c_int))
    sample, crops = (c_uint64,) * 3, (c_int, c_int, c_int, c_void_p, *strides)
    loaded.mocov3_make_crops.argtypes = (*image, POINTER(Spec), *sample, *crops, c_void_p, c_int)
    batch = (c_void_p, c_void_p, c_int64, c_int, c_int, c_int)
    loaded.mocov3_augment_crops.argtypes = batch
    loaded.mocov3_make_views.argtypes = (*batch, c_void_p, c_void_p, c_int, c_void_p)


# ----------------------------------------------------------------------------- stored images


def read_size(image_bytes: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of a plain JPEG in pixels; None if Pillow must look."""
    size = (c_int * 2)()
    verdict = jpeg_library().mocov3_read_size(image_bytes, len(image_bytes), max_pixels, size)
    return (size[0], size[1]) if verdict == READ else None


def cut_crops(
    image_bytes: bytes,
    boxes: Sequence[Box],
    flips: Sequence[bool],
    out_VCHW: NDArray[np.uint8],
    max_pixels: int,
    library: ctypes.CDLL | None = None,
) -> int:
    """`decode.cut_crops` of a plain JPEG into contiguous rows. Returns the verdict.

    Args:
        image_bytes: Bytes of the stored image.
        boxes: Boxes of the two views.
        flips: Whether to mirror each view left to right.
        out_VCHW: Crops of 3 channels or 1 that are written; their rows are contiguous.
        max_pixels: Larger images are not read.
        library: Library that is not proven yet; None = that of `jpeg_library`.
    """
    view, plane, row, _ = out_VCHW.strides
    (_, channels, *size), start = out_VCHW.shape, out_VCHW.ctypes.data
    crops = (Crop * 2)(
        *(
            Crop(*box, *size, 0, 0, *size, flip, channels, plane, row, start + i * view)
            for i, (box, flip) in enumerate(zip(boxes, flips, strict=True))
        )
    )
    library = library or jpeg_library()
    return library.mocov3_cut_crops(image_bytes, len(image_bytes), max_pixels, crops, 2)


def cut_window(
    image_bytes: bytes,
    height_width: tuple[int, int],
    resized: tuple[int, int],
    corner: tuple[int, int],
    out_CHW: NDArray[np.uint8],
    max_pixels: int,
) -> int:
    """Resize an image and keep the window of `out_CHW`'s size at `corner`. Returns the verdict."""
    (channels, *size), (plane, row, _) = out_CHW.shape, out_CHW.strides
    out = (*size, 0, channels, plane, row, out_CHW.ctypes.data)
    crop = ctypes.byref(Crop(0, 0, *height_width, *resized, *corner, *out))
    return jpeg_library().mocov3_cut_crops(image_bytes, len(image_bytes), max_pixels, crop, 1)


def make_crops(
    image_bytes: bytes,
    spec: ViewSpec,
    sample: tuple[int, int, int],
    crops_VCHW: NDArray[np.uint8],
    params_VP: NDArray[np.float32],
    max_pixels: int,
    augment: bool,
) -> int:
    """`crops.make_crops` for plain JPEGs, in one pass over the bytes. Returns the verdict.

    Args:
        image_bytes: Bytes of the stored image.
        spec: Distribution of the views.
        sample: Seed, epoch and sample number, each taken modulo 2^64.
        crops_VCHW: Crops of 3 channels or 1 that are written; their rows are contiguous, and with
            `augment` all of a view is.
        params_VP: Contiguous parameter rows that are written.
        max_pixels: Larger images are not read.
        augment: Whether to change the colours of the crops as well.
    """
    return jpeg_library().mocov3_make_crops(
        image_bytes,
        len(image_bytes),
        max_pixels,
        pack_spec(spec),
        *sample,
        *crops_VCHW.shape[1:],
        crops_VCHW.ctypes.data,
        *crops_VCHW.strides[:3],
        params_VP.ctypes.data,
        augment,
    )


@cache
def pack_spec(spec: ViewSpec) -> Spec:
    """The distribution of views in the form that the library reads."""
    return Spec(*(getattr(spec, name) for name, *_ in Spec._fields_))


# --------------------------------------------------------------------------------- colour work


def make_views(
    crops_BCHW: NDArray[np.uint8],
    params_BP: NDArray[np.float32],
    scale_C: NDArray[np.float32],
    shift_C: NDArray[np.float32],
    kind: int,
    out: int,
) -> None:
    """Colour work, then pixel * scale + shift; all arrays are contiguous.

    Args:
        crops_BCHW: Crops, which stay as they are.
        params_BP: Parameter rows of the crops.
        scale_C: Factor of a pixel, for each channel.
        shift_C: Summand of a scaled pixel, for each channel.
        kind: Type of the views, `FLOAT32` or `BFLOAT16`.
        out: Address that the views are written to.

    Raises:
        MemoryError: A copy of one crop does not fit into memory.
    """
    if colour_library().mocov3_make_views(
        *_batch_arguments(crops_BCHW, params_BP),
        scale_C.ctypes.data,
        shift_C.ctypes.data,
        kind,
        out,
    ):
        raise MemoryError


def augment_crops(crops_BCHW: NDArray[np.uint8], params_BP: NDArray[np.float32]) -> None:
    """Colour work in place; both arrays are contiguous. Raises MemoryError."""
    if colour_library().mocov3_augment_crops(*_batch_arguments(crops_BCHW, params_BP)):
        raise MemoryError


def _batch_arguments(
    crops_BCHW: NDArray[np.uint8], params_BP: NDArray[np.float32]
) -> tuple[int, ...]:
    return crops_BCHW.ctypes.data, params_BP.ctypes.data, *crops_BCHW.shape


# ------------------------------------------------------------------------- Pillow's libjpeg


def find_libjpegs() -> list[str]:
    """Files to try: those that Pillow came with, then any other in this process (torchvision's)."""
    package = Path(Image.__file__).parent
    folders = [package.parent / "pillow.libs", package / ".dylibs", Path(sys.prefix) / "lib"]
    paths: list[str] = []
    for folder in folders:
        paths += sorted(str(p) for p in folder.glob("libjpeg*.so*"))
        paths += sorted(str(p) for p in folder.glob("libjpeg*.dylib"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()]
        paths += [p for p in mapped if Path(p).name.startswith("libjpeg")]
    return list(dict.fromkeys([*paths, "libjpeg.so.62", "libjpeg.so.8"]))


def _pillow_weighs_tall_rows_first() -> bool:
    """Newer Pillows resize tall images rows first, and the rounding in between differs."""
    column = np.arange(300, dtype=np.uint32)[:, None] * 2_654_435_761 >> np.arange(9) * 3
    image = Image.fromarray((column & 255).astype(np.uint8))
    bilinear = Image.Resampling.BILINEAR
    columns_first = image.resize((20, 300), bilinear).resize((20, 20), bilinear)
    return image.resize((20, 20), bilinear).tobytes() != columns_first.tobytes()


def _difference_from_pillow(loaded: ctypes.CDLL) -> int:
    """Largest difference of a small chroma-subsampled image's crops; 256 = not decoded."""
    row, column = np.mgrid[:70, :90]
    channels = [(column * 5 + row) % 256, (row * 7) % 256, (column * row) % 256]
    pixels = np.stack(channels, -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=2)
    image_bytes, size = buffer.getvalue(), 33
    boxes = [(0, 0, 70, 90), (13, 30, 50, 41)]
    out_VCHW = np.empty((2, 3, size, size), np.uint8)
    if cut_crops(image_bytes, boxes, (False, False), out_VCHW, 1 << 20, loaded) != READ:
        return 256
    image, bilinear = Image.open(buffer), Image.Resampling.BILINEAR
    crops = (image.crop((x, y, x + width, y + height)) for y, x, height, width in boxes)
    expected_VHWC = np.stack([np.asarray(crop.resize((size, size), bilinear)) for crop in crops])
    return int(np.abs(expected_VHWC.transpose(0, 3, 1, 2).astype(int) - out_VCHW).max())
