# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""`views.photometric` as Triton kernels: the same whole numbers, a few reads and writes of a crop.

    uint8 crops -> jitter up to the contrast, sum of luma -> rest of the jitter, grey
                -> six box passes over the blurred rows alone -> solarise, normalise, cast

Between the kernels a crop is uint8, as between Pillow's operations. Only the contrast, which needs
the mean of the whole image, and the passes of the blur, which look at neighbours, need a kernel of
their own. Which rows are blurred is known from the parameters in CPU memory: nothing waits for the
device. Multiplication and addition are not fused (one rounding where Pillow makes two would show),
and divisions are the correctly rounded ones. With TRITON_INTERPRET=1 in the environment before
triton is imported, the same code runs on the CPU, slowly, for tests.

Shape suffixes: B = rank batch, R = blurred rows, C H W = image, P = parameters of a view.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mocov3_ds.data.views import photometric as views

_BLOCK = 1024
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_CONTRAST = tl.constexpr(views.CONTRAST)
_BRIGHTNESS = tl.constexpr(views.BRIGHTNESS)
_SATURATION = tl.constexpr(views.SATURATION)
_HUE = tl.constexpr(views.HUE)
_ORDER = tl.constexpr(views.ORDER)
_GREY = tl.constexpr(views.GREY)
_RADIUS = tl.constexpr(views.BOX_RADIUS)
_WEIGHT = tl.constexpr(views.BOX_WEIGHT)
_EDGE = tl.constexpr(views.BOX_EDGE)
_SOLARISE = tl.constexpr(views.SOLARISE)
_PARAMETERS = tl.constexpr(views.PARAMETERS)


def photometric(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out_BCHW: Tensor,
) -> Tensor:
    """`views.photometric` into `out_BCHW`, on the device of the crops."""
    device = crops_BCHW.device
    crops_BCHW = crops_BCHW.contiguous()
    count, _, height, width = crops_BCHW.shape
    plane = height * width
    rows_BP = params_BP.to(device, non_blocking=True)
    if not count:
        return out_BCHW
    work_BCHW = torch.empty_like(crops_BCHW)
    sums_B = torch.zeros(count, dtype=torch.int32, device=device)
    orders = _orders(device)
    blocks = triton.cdiv(plane, _BLOCK)
    colours = (rows_BP, orders, sums_B, plane, _BLOCK)
    colour_pass[(blocks, count)](crops_BCHW, work_BCHW, *colours, False, **_OPTIONS)
    colour_pass[(blocks, count)](work_BCHW, work_BCHW, *colours, True, **_OPTIONS)
    blurred_R = (params_BP[:, views.BOX_RADIUS] >= 0).nonzero().flatten().int()
    if len(blurred_R):
        at_R = blurred_R.to(device, non_blocking=True)
        here, there = work_BCHW, torch.empty_like(work_BCHW)
        for vertical in (False, False, False, True, True, True):
            grid = (blocks, 3, len(blurred_R))
            box_pass[grid](here, there, rows_BP, at_R, height, width, _BLOCK, vertical, **_OPTIONS)
            here, there = there, here  # after six passes the result is where it began
    scale_C, shift_C = views.scale_and_shift(mean, std)
    factors = (*scale_C.tolist(), *shift_C.tolist())
    finish_pass[(blocks, 3, count)](
        work_BCHW, out_BCHW, rows_BP, *factors, plane, _BLOCK, **_OPTIONS
    )
    return out_BCHW


@cache
def _orders(device: torch.device) -> Tensor:
    """Jitter operations of each order, and none for order -1 in the last row, int32 (25, 4)."""
    return torch.tensor([*views.ORDERS, (-1,) * 4], dtype=torch.int32, device=device)


@triton.jit
def _luma(r, g, b):
    whole = r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471
    return (whole + 32768) >> 16


@triton.jit
def _whole(x):
    """Clipped to 0 .. 255 and truncated."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _turned(hue, ahead, saturation, value):
    place = hue + ahead
    place = tl.where(place >= 1530.0, place - 1530.0, place)
    weight = tl.minimum(tl.maximum(tl.minimum(place, 1020.0 - place), 0.0), 255.0)
    shade = (65025.0 - weight * saturation) * value * (1.0 / 65025.0) + 0.5
    return shade.to(tl.int32).to(tl.float32)


@triton.jit
def _hue_turned(r, g, b, turn):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    divisor = tl.maximum(chroma, 1.0)
    red = tl.div_rn(value - r, divisor)
    green = tl.div_rn(value - g, divisor)
    blue = tl.div_rn(value - b, divisor)
    sector = tl.where(green == 1.0, 5.0 - red, 3.0 + green)
    sector = tl.where(green == 0.0, tl.where(red == 1.0, 3.0 - blue, 1.0 + red), sector)
    sector = tl.where(red == 0.0, blue - green, sector)
    sector = tl.div_rn(sector, tl.full(sector.shape, 6.0, tl.float32))
    sector = tl.where(sector < 0.0, sector + 1.0, sector)
    hue = (sector * 255.0).to(tl.int32).to(tl.float32) + turn
    hue = tl.where(hue >= 256.0, hue - 256.0, hue) * 6.0
    saturation = tl.div_rn(chroma * 255.0, tl.maximum(value, 1.0)).to(tl.int32).to(tl.float32)
    return (
        _turned(hue, 1275.0, saturation, value),
        _turned(hue, 765.0, saturation, value),
        _turned(hue, 255.0, saturation, value),
    )


@triton.jit
def colour_pass(
    source, target, rows, orders, sums, plane, BLOCK: tl.constexpr, SECOND: tl.constexpr
):
    """Jitter before the contrast and the sum of luma there; if SECOND, the rest and the grey."""
    image = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < plane
    begin = image.to(tl.int64) * 3 * plane
    r = tl.load(source + begin + at, mask, 0).to(tl.float32)
    g = tl.load(source + begin + plane + at, mask, 0).to(tl.float32)
    b = tl.load(source + begin + 2 * plane + at, mask, 0).to(tl.float32)
    row = rows + image * _PARAMETERS
    order = tl.load(row + _ORDER).to(tl.int32)
    order = tl.where(order < 0, 24, order)
    contrast_seen = False
    for turn in tl.static_range(4):
        operation = tl.load(orders + order * 4 + turn)
        contrast_seen = contrast_seen | (operation == _CONTRAST)
        if contrast_seen == SECOND:
            factor = tl.load(row + tl.maximum(operation, 0))
            if operation == _BRIGHTNESS:
                r, g, b = _whole(r * factor), _whole(g * factor), _whole(b * factor)
            elif operation == _CONTRAST:
                total = tl.load(sums + image).to(tl.int64)
                mean = ((2 * total + plane) // (2 * plane)).to(tl.float32)
                r = _whole((r - mean) * factor + mean)
                g = _whole((g - mean) * factor + mean)
                b = _whole((b - mean) * factor + mean)
            elif operation == _SATURATION:
                base = _luma(r, g, b).to(tl.float32)
                r = _whole((r - base) * factor + base)
                g = _whole((g - base) * factor + base)
                b = _whole((b - base) * factor + base)
            elif operation == _HUE:
                r, g, b = _hue_turned(r, g, b, factor)
    if SECOND:
        if tl.load(row + _GREY) > 0:
            r = _luma(r, g, b).to(tl.float32)
            g = r
            b = r
    else:
        # Sums of whole numbers: the order of the additions does not matter.
        tl.atomic_add(sums + image, tl.sum(tl.where(mask, _luma(r, g, b), 0), 0))
    tl.store(target + begin + at, r.to(tl.uint8), mask)
    tl.store(target + begin + plane + at, g.to(tl.uint8), mask)
    tl.store(target + begin + 2 * plane + at, b.to(tl.uint8), mask)


@triton.jit
def box_pass(
    source, target, rows, images, height, width, BLOCK: tl.constexpr, VERTICAL: tl.constexpr
):
    """One pass of the blur along one axis of the images listed; borders repeat."""
    image = tl.load(images + tl.program_id(2))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < height * width
    begin = (image.to(tl.int64) * 3 + tl.program_id(1)) * height * width
    y, x = at // width, at % width
    row = rows + image * _PARAMETERS
    radius = tl.load(row + _RADIUS).to(tl.int32)
    weight = tl.load(row + _WEIGHT).to(tl.int32).to(tl.uint32)
    edge = tl.load(row + _EDGE).to(tl.int32).to(tl.uint32)
    middle = tl.load(source + begin + at, mask, 0).to(tl.uint32)
    ends = tl.zeros_like(middle)
    for offset in range(1, radius + 2):
        if VERTICAL:
            before = tl.maximum(y - offset, 0) * width + x
            behind = tl.minimum(y + offset, height - 1) * width + x
        else:
            before = y * width + tl.maximum(x - offset, 0)
            behind = y * width + tl.minimum(x + offset, width - 1)
        pair = tl.load(source + begin + before, mask, 0).to(tl.uint32)
        pair += tl.load(source + begin + behind, mask, 0).to(tl.uint32)
        middle += tl.where(offset <= radius, pair, 0).to(tl.uint32)
        ends = tl.where(offset <= radius, ends, pair)
    blurred = (middle * weight + ends * edge + (1 << 23)) >> 24
    tl.store(target + begin + at, blurred.to(tl.uint8), mask)


@triton.jit
def finish_pass(
    source, target, rows, scale0, scale1, scale2, shift0, shift1, shift2, plane, BLOCK: tl.constexpr
):
    """Solarise, normalise and cast one channel."""
    channel = tl.program_id(1)
    image = tl.program_id(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < plane
    begin = (image.to(tl.int64) * 3 + channel) * plane
    x = tl.load(source + begin + at, mask, 0).to(tl.float32)
    solarised = tl.load(rows + image * _PARAMETERS + _SOLARISE) > 0
    x = tl.where(solarised, tl.where(x >= 128.0, 255.0 - x, x), x)
    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    shift = tl.where(channel == 0, shift0, tl.where(channel == 1, shift1, shift2))
    tl.store(target + begin + at, (x * scale + shift).to(target.dtype.element_ty), mask)
