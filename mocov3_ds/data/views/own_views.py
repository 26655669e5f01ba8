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
        for part in attribute.split("."):
            function = getattr(function, part)
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
    parts = decode.decode_layers(image_bytes, spec.channels)
    sample_key = splitmix.hash_counters(*key)
    for view, function in enumerate(spec.functions):
        generator = np.random.Generator(np.random.Philox(key=splitmix.hash_word(sample_key + view)))
        # each call gets an image of its own, which it may change
        image = parts[0].copy() if len(parts) == 1 else layers.stack(parts).transpose(1, 2, 0)
        try:
            made = function(image, generator)
        except Exception as error:
            raise ValueError(
                f"the view function {_name_of(function)} fails on sample {key[2]}: "
                f"{type(error).__name__}: {error}"
            ) from error
        view_CHW = _as_input(made, spec)
        if view_CHW is None or view_CHW.shape != out_VCHW.shape[1:]:
            channels, height, width = out_VCHW.shape[1:]
            raise ValueError(
                f"the view function {_name_of(function)} gives {_describe(made)}; a uint8 image of "
                f"{height} x {width} pixels and {channels} channels, or a floating-point tensor "
                f"({channels}, {height}, {width}), must come (--views.image_size, "
                "--views.channels)."
            )
        out_VCHW[view] = view_CHW


def _as_input(made: object, spec: ViewSpec) -> NDArray[np.float32] | None:
    """What a function made as network input (C, H, W); None where it is no view."""
    if isinstance(made, Image.Image):
        made = np.asarray(made)
    if isinstance(made, Tensor):
        made = made.detach().cpu().numpy()
    if not isinstance(made, np.ndarray):
        return None
    if made.dtype == np.uint8 and made.ndim in (2, 3):
        pixels_1CHW = torch.from_numpy(np.atleast_3d(made).transpose(2, 0, 1)[None].copy())
        if pixels_1CHW.shape[1] != spec.channels:
            return None
        normalised = photometric.normalise_crops(pixels_1CHW, spec.mean, spec.std, torch.float32)
        return normalised[0].numpy()
    return made.astype(np.float32) if made.dtype.kind == "f" else None


def _describe(made: object) -> str:
    if isinstance(made, Image.Image):
        return f"an image of {made.height} x {made.width} pixels in {made.mode}"
    if isinstance(made, np.ndarray | Tensor):
        return f"{made.dtype} of the shape {tuple(made.shape)}"
    return f"a {type(made).__name__}"


def _name_of(function: ViewFunction) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
