"""How do functions of a user's own make the two views of an image?

A function gets the decoded image and a random generator, and gives one view of it:

    def my_view(image: PIL.Image.Image, rng: numpy.random.Generator) -> ...

The image is a Pillow image in RGB, or grey for one channel; of other channels it is an array
(H, W, C), uint8. The generator's numbers follow from (seed, epoch, sample, view) alone; a function
that draws from it, and from nothing else, gives the same views on any number of ranks and after a
resume. It runs in the decoding threads, several at once.

The view is a Pillow image or a uint8 array (H, W, C), which is normalised like any other, or a
floating-point tensor or array (C, H, W), which the network takes as it is.

Shape suffixes: V = the two views, C H W = image.
"""

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mocov3_ds.data import splitmix
from mocov3_ds.data.views import decode, layers, photometric
from mocov3_ds.data.views.spec import ViewFunction, ViewSpec


def load_functions(names: Sequence[str]) -> tuple[ViewFunction, ViewFunction] | None:
    """The functions of a command line, for view 1 and view 2.

    Args:
        names: None, one for both views, or two; each `package.module:name`.

    Raises:
        ValueError: there is no such module or function.
    """
    if not names:
        return None
    functions = [_load_function(name) for name in names]
    return functions[0], functions[-1]


def _load_function(name: str) -> ViewFunction:
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ValueError("it has no colon")
        function: object = importlib.import_module(module)
        for inner_name in attribute.split("."):
            function = getattr(function, inner_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--views.function {name} is no function ({error}); write package.module:name, of a "
            "module that Python finds (PYTHONPATH)."
        ) from None
    if not callable(function):
        raise ValueError(f"--views.function {name} is a {type(function).__name__}, no function.")
    return function


def make_own_views(
    image_bytes: bytes, spec: ViewSpec, key: tuple[int, int, int], out_VCHW: NDArray[np.float32]
) -> None:
    """Write the two views of a sample as the functions of `spec` make them.

    Args:
        image_bytes: Bytes of the stored image.
        spec: The functions, mean and deviation.
        key: Seed of the run, epoch and number of the sample.
        out_VCHW: (2, C, H, W) float32 that is written, normalised.

    Raises:
        decode.UnreadableImage: The image cannot be read.
        ValueError: A function fails, or its view has another shape or type.
    """
    assert spec.functions is not None
    image_layers = decode.decode_layers(image_bytes, spec.channels)
    sample_key = splitmix.hash_counters(*key)
    for view, function in enumerate(spec.functions):
        generator = np.random.Generator(np.random.Philox(key=splitmix.hash_word(sample_key + view)))
        image = _copy_image(image_layers)
        try:
            returned = function(image, generator)
        except Exception as error:
            raise ValueError(
                f"the view function {_name_of(function)} fails on sample {key[2]}: "
                f"{type(error).__name__}: {error}"
            ) from error
        view_CHW = _as_input(returned, spec)
        if view_CHW is None or view_CHW.shape != out_VCHW.shape[1:]:
            channels, height, width = out_VCHW.shape[1:]
            raise ValueError(
                f"the view function {_name_of(function)} gives {_describe_view(returned)}; a uint8 "
                f"image of {height} x {width} pixels and {channels} channels, or a floating-point "
                f"tensor ({channels}, {height}, {width}), must come (--views.image_size, "
                "--views.channels)."
            )
        out_VCHW[view] = view_CHW


def _copy_image(image_layers: Sequence[Image.Image]) -> Image.Image | NDArray[np.uint8]:
    """An image that a function may change: Pillow's, or an array (H, W, C)."""
    if len(image_layers) == 1:
        return image_layers[0].copy()
    return layers.stack_layers(image_layers).transpose(1, 2, 0)


def _as_input(view: object, spec: ViewSpec) -> NDArray[np.float32] | None:
    """What a function returned as network input (C, H, W); None where it is no view."""
    if isinstance(view, Image.Image):
        view = np.asarray(view)
    if isinstance(view, Tensor):
        view = view.detach().cpu().numpy()
    if not isinstance(view, np.ndarray):
        return None
    if view.dtype == np.uint8 and view.ndim in (2, 3):
        pixels_1CHW = torch.from_numpy(np.atleast_3d(view).transpose(2, 0, 1)[None].copy())
        if pixels_1CHW.shape[1] != spec.channels:
            return None
        normalised = photometric.normalise_crops(pixels_1CHW, spec.mean, spec.std, torch.float32)
        return normalised[0].numpy()
    return view.astype(np.float32) if view.dtype.kind == "f" else None


def _describe_view(view: object) -> str:
    if isinstance(view, Image.Image):
        return f"an image of {view.height} x {view.width} pixels in {view.mode}"
    if isinstance(view, np.ndarray | Tensor):
        return f"{view.dtype} of the shape {tuple(view.shape)}"
    return f"a {type(view).__name__}"


def _name_of(function: ViewFunction) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
