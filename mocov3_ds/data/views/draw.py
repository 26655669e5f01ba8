"""What is random about a view: its box, its flip and its parameter row.

The recipe is BYOL's asymmetric one (arXiv 2006.07733, App. B) as MoCo v3 uses it: random resized
crop, colour jitter in a drawn order, grey, blur, solarisation, flip.

Every random number is a hash of (seed, epoch, sample, view, purpose), so a view depends on nothing
else: not on the rank, the thread, the row in the batch or a resume. Only operations that IEEE 754
rounds correctly are used, so that the C++ code (`native/draw.cpp`) draws the same bits; tests
compare the two.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data import splitmix
from mocov3_ds.data.views.spec import (
    ATTEMPTS,
    ORDERS,
    PLAIN_PARAMS,
    Box,
    Column,
    Purpose,
    ViewSpec,
)

_TAYLOR = tuple(1 / math.factorial(n) for n in range(13, -1, -1))


def draw_views(
    spec: ViewSpec, seed: int, epoch: int, sample_id: int, height: int, width: int
) -> tuple[list[Box], list[bool], NDArray[np.float32]]:
    """Draw everything that is random about the two views of a sample.

    Args:
        spec: Distribution of the views.
        seed: Seed of the run.
        epoch: Number of the pass over the data.
        sample_id: Number of the sample in its manifest.
        height: Height of the stored image in pixels.
        width: Width of the stored image in pixels.

    Returns:
        The two boxes in the stored image, the two flips, and params_VP, the parameter rows (2, P)
        of the two views, float32.
    """
    sample_key = splitmix.hash_counters(seed, epoch, sample_id)
    boxes, flips, rows = [], [], []
    for view in (0, 1):
        key = splitmix.hash_word(sample_key + view)
        boxes.append(_draw_box(key, spec, height, width))
        flips.append(_draw_uniform(key, Purpose.DRAW_FLIP) < spec.flip_p)
        rows.append(_draw_params(key, spec, view))
    return boxes, flips, np.array(rows, dtype=np.float32)


def box_filter(sigma: float) -> tuple[int, int, int]:
    """Pillow's box filter for a blur: integer radius r, weight and edge weight in 1/2^24.

    A pass replaces a pixel by weight * (the 2r + 1 pixels around it) + edge * (the next two).
    Precision follows Pillow: float32 variables, float64 where a C expression widens.
    """
    f32 = np.float32
    variance = f32(sigma) * f32(sigma) / f32(3)
    length = f32(math.sqrt(12.0 * float(variance) + 1.0))
    floored = f32(math.floor((float(length) - 1.0) / 2.0))
    fraction = (2 * floored + 1) * (floored * (floored + 1) - 3 * variance)
    fraction /= 6 * (variance - (floored + 1) * (floored + 1))
    radius = floored + fraction
    weight = int(f32(1 << 24) / (radius * 2 + 1))
    return int(radius), weight, ((1 << 24) - (2 * int(radius) + 1) * weight) // 2


def _draw_uniform(key: int, place: int) -> float:
    """A multiple of 2^-53 in [0, 1)."""
    return (splitmix.hash_word(key + place) >> 11) * 2.0**-53


def _draw_below(key: int, place: int, bound: int) -> int:
    """A whole number from 0 to bound - 1."""
    return ((splitmix.hash_word(key + place) >> 32) * bound) >> 32


def _exp_series(x: float) -> float:
    """exp(x) by its series and squares: the same bits in any language, unlike a libm's."""
    if abs(x) >= 0.3:
        half = _exp_series(x / 2)
        return half * half
    total = 0.0
    for coefficient in _TAYLOR:
        total = total * x + coefficient
    return total


def _draw_box(key: int, spec: ViewSpec, height: int, width: int) -> Box:
    """Random resized crop as torchvision draws it: ten attempts, then the central fallback."""
    crop_min, crop_max = spec.crop_min, spec.crop_max
    log_centre, log_reach = spec.log_aspect
    for attempt in range(ATTEMPTS):
        share = crop_min + (crop_max - crop_min) * _draw_uniform(key, 2 * attempt)
        drawn = 2 * _draw_uniform(key, 2 * attempt + 1) - 1
        ratio = _exp_series(log_centre + drawn * log_reach)
        area = share * (height * width)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = _draw_below(key, Purpose.DRAW_TOP, height - crop_height + 1)
            from_left = _draw_below(key, Purpose.DRAW_LEFT, width - crop_width + 1)
            return top, from_left, crop_height, crop_width
    narrowest, widest = spec.aspect
    crop_height, crop_width = height, width
    if width / height < narrowest:
        crop_height = round(width / narrowest)
    elif width / height > widest:
        crop_width = round(height * widest)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_params(key: int, spec: ViewSpec, view: int) -> list[float]:
    """Parameter row (P,) of one view."""
    params = list(PLAIN_PARAMS)
    if _draw_uniform(key, Purpose.DRAW_JITTER) < spec.jitter_p:
        for column, strength in enumerate((spec.brightness, spec.contrast, spec.saturation)):
            drawn = _draw_uniform(key, Purpose.DRAW_FACTORS + column)
            params[column] = 1 - strength + 2 * strength * drawn
        turn = spec.hue * (2 * _draw_uniform(key, Purpose.DRAW_FACTORS + Column.HUE) - 1)
        # torchvision's truncation and 8-bit wrap; without a strength it turns nothing, not by 0
        params[Column.HUE] = int(turn * 255) & 255 if spec.hue else -1
        params[Column.ORDER] = _draw_below(key, Purpose.DRAW_ORDER, len(ORDERS))
    params[Column.GREY] = _draw_uniform(key, Purpose.DRAW_GREY) < spec.grey_p
    if _draw_uniform(key, Purpose.DRAW_BLUR) < spec.blur_p[view]:
        low, high = spec.blur_sigma
        sigma = low + (high - low) * _draw_uniform(key, Purpose.DRAW_SIGMA)
        params[Column.BOX_RADIUS : Column.BOX_EDGE + 1] = box_filter(sigma)
    if _draw_uniform(key, Purpose.DRAW_SOLARISE) < spec.solarise_p[view]:
        params[Column.SOLARISE] = spec.solarise_threshold / 128
    return params
