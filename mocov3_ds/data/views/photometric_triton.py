# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""`photometric.make_views` as Triton kernels: the same numbers, few reads and writes of a crop.

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

from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mocov3_ds.data.views.spec import ORDERS, PARAMETERS, Column

_BLOCK = 1024
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_BRIGHTNESS = tl.constexpr(int(Column.BRIGHTNESS))
_CONTRAST = tl.constexpr(int(Column.CONTRAST))
_SATURATION = tl.constexpr(int(Column.SATURATION))
_HUE = tl.constexpr(int(Column.HUE))
_ORDER = tl.constexpr(int(Column.ORDER))
_GREY = tl.constexpr(int(Column.GREY))
_RADIUS = tl.constexpr(int(Column.BOX_RADIUS))
_WEIGHT = tl.constexpr(int(Column.BOX_WEIGHT))
_EDGE = tl.constexpr(int(Column.BOX_EDGE))
_SOLARISE = tl.constexpr(int(Column.SOLARISE))
_PARAMETERS = tl.constexpr(PARAMETERS)
_NO_JITTER = tl.constexpr(len(ORDERS))  # row of the table of orders behind the real ones


def make_views(
    crops_BCHW: Tensor, params_BP: Tensor, scale_C: Tensor, shift_C: Tensor, out_BCHW: Tensor
) -> Tensor:
    """`photometric.make_views` on the device of the crops.

    Args:
        crops_BCHW: uint8 crops on the device, of three channels, or of one: each channel of an
            image after the other, as `photometric.split_channels` lays them out.
        params_BP: Parameter rows of the crops, float32, in CPU memory.
        scale_C: Factor of a pixel for each channel, in CPU memory.
        shift_C: Summand of a scaled pixel for each channel, in CPU memory.
        out_BCHW: Contiguous tensor on the device that the views are written into, also returned.
    """
    device, channels = crops_BCHW.device, len(scale_C)
    crops_BCHW = crops_BCHW.contiguous()
    count, planes, height, width = crops_BCHW.shape
    plane = height * width
    rows_BP = params_BP.to(device, non_blocking=True)
    if not count:
        return out_BCHW
    work_BCHW = torch.empty_like(crops_BCHW)
    sums_B = torch.zeros(count, dtype=torch.int32, device=device)
    blocks = triton.cdiv(plane, _BLOCK)
    colours = (rows_BP, _order_table(device), sums_B, plane, _BLOCK)
    change_colours = colour_pass if planes == 3 else level_pass
    change_colours[(blocks, count)](crops_BCHW, work_BCHW, *colours, False, **_OPTIONS)
    change_colours[(blocks, count)](work_BCHW, work_BCHW, *colours, True, **_OPTIONS)
    blurred_R = (params_BP[:, Column.BOX_RADIUS] >= 0).nonzero().flatten().int()
    if len(blurred_R):
        images_R = blurred_R.to(device, non_blocking=True)
        grid = (blocks, planes, len(blurred_R))
        source, target = work_BCHW, torch.empty_like(work_BCHW)
        for vertical in (False, False, False, True, True, True):
            sizes = (height, width, planes, _BLOCK, vertical)
            box_pass[grid](source, target, rows_BP, images_R, *sizes, **_OPTIONS)
            source, target = target, source  # after six passes the result is in work_BCHW again
    factors_2C = _factor_table(tuple(scale_C.tolist()), tuple(shift_C.tolist()), device)
    finish_pass[(blocks, planes, count)](
        work_BCHW, out_BCHW, rows_BP, factors_2C, channels, planes, plane, _BLOCK, **_OPTIONS
    )
    return out_BCHW


@cache
def _factor_table(
    scale: tuple[float, ...], shift: tuple[float, ...], device: torch.device
) -> Tensor:
    """Factor of a pixel in the first row, summand in the second, fp32 (2, C)."""
    return torch.tensor([scale, shift], device=device)


@cache
def _order_table(device: torch.device) -> Tensor:
    """Jitter operations of each order, and none for no jitter in the last row, int32 (25, 4)."""
    return torch.tensor([*ORDERS, (-1,) * 4], dtype=torch.int32, device=device)


@triton.jit
def _luma(r, g, b):
    luma = r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471
    return (luma + 32768) >> 16


@triton.jit
def _blend(x, base, factor):
    """Pillow's blend of a degenerate image with the image: clipped to 0 .. 255 and truncated."""
    blended = (x - base) * factor + base
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _channel_of_hue(hue, ahead, saturation, value):
    position = hue + ahead
    position = tl.where(position >= 1530.0, position - 1530.0, position)
    weight = tl.minimum(tl.maximum(tl.minimum(position, 1020.0 - position), 0.0), 255.0)
    shade = (65025.0 - weight * saturation) * value * (1.0 / 65025.0) + 0.5
    return shade.to(tl.int32).to(tl.float32)


@triton.jit
def _turn_hue(r, g, b, turn):
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
        _channel_of_hue(hue, 1275.0, saturation, value),
        _channel_of_hue(hue, 765.0, saturation, value),
        _channel_of_hue(hue, 255.0, saturation, value),
    )


@triton.jit
def colour_pass(
    source, target, rows, orders, sums, plane, BLOCK: tl.constexpr, SECOND: tl.constexpr
):
    """Jitter before the contrast and the sum of luma; if SECOND, the later jitter and grey."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < plane
    begin = image.to(tl.int64) * 3 * plane
    r = tl.load(source + begin + pixel, mask, 0).to(tl.float32)
    g = tl.load(source + begin + plane + pixel, mask, 0).to(tl.float32)
    b = tl.load(source + begin + 2 * plane + pixel, mask, 0).to(tl.float32)
    row = rows + image * _PARAMETERS
    order = tl.load(row + _ORDER).to(tl.int32)
    order = tl.where(order < 0, _NO_JITTER, order)
    contrast_seen = False
    for turn in tl.static_range(4):
        operation = tl.load(orders + order * 4 + turn)
        contrast_seen = contrast_seen | (operation == _CONTRAST)
        if contrast_seen == SECOND:
            factor = tl.load(row + tl.maximum(operation, 0))
            if operation == _HUE:
                if factor >= 0:
                    r, g, b = _turn_hue(r, g, b, factor)
            elif operation >= 0:
                base = tl.zeros_like(r)  # of the brightness
                if operation == _CONTRAST:
                    total = tl.load(sums + image).to(tl.int64)
                    base += ((2 * total + plane) // (2 * plane)).to(tl.float32)
                elif operation == _SATURATION:
                    base = _luma(r, g, b).to(tl.float32)
                r, g, b = _blend(r, base, factor), _blend(g, base, factor), _blend(b, base, factor)
    if SECOND:
        if tl.load(row + _GREY) > 0:
            r = _luma(r, g, b).to(tl.float32)
            g = r
            b = r
    else:
        # Sums of whole numbers: the order of the additions does not matter.
        tl.atomic_add(sums + image, tl.sum(tl.where(mask, _luma(r, g, b), 0), 0))
    tl.store(target + begin + pixel, r.to(tl.uint8), mask)
    tl.store(target + begin + plane + pixel, g.to(tl.uint8), mask)
    tl.store(target + begin + 2 * plane + pixel, b.to(tl.uint8), mask)


@triton.jit
def level_pass(
    source, target, rows, orders, sums, plane, BLOCK: tl.constexpr, SECOND: tl.constexpr
):
    """`colour_pass` of images of one channel: brightness, and contrast around their own mean."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < plane
    begin = image.to(tl.int64) * plane
    x = tl.load(source + begin + pixel, mask, 0).to(tl.float32)
    row = rows + image * _PARAMETERS
    order = tl.load(row + _ORDER).to(tl.int32)
    order = tl.where(order < 0, _NO_JITTER, order)
    contrast_seen = False
    for turn in tl.static_range(4):
        operation = tl.load(orders + order * 4 + turn)
        contrast_seen = contrast_seen | (operation == _CONTRAST)
        if contrast_seen == SECOND:
            base = tl.zeros_like(x)  # of the brightness
            if operation == _CONTRAST:
                total = tl.load(sums + image).to(tl.int64)
                base += ((2 * total + plane) // (2 * plane)).to(tl.float32)
            if (operation == _CONTRAST) | (operation == _BRIGHTNESS):
                x = _blend(x, base, tl.load(row + operation))
    if not SECOND:
        tl.atomic_add(sums + image, tl.sum(tl.where(mask, x.to(tl.int32), 0), 0))
    tl.store(target + begin + pixel, x.to(tl.uint8), mask)


@triton.jit
def box_pass(
    source, target, rows, images, height, width, planes, BLOCK: tl.constexpr, VERTICAL: tl.constexpr
):
    """One pass of the blur along one axis of the images listed; borders repeat."""
    image = tl.load(images + tl.program_id(2))
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < height * width
    begin = (image.to(tl.int64) * planes + tl.program_id(1)) * height * width
    y, x = pixel // width, pixel % width
    row = rows + image * _PARAMETERS
    radius = tl.load(row + _RADIUS).to(tl.int32)
    weight = tl.load(row + _WEIGHT).to(tl.int32).to(tl.uint32)
    edge = tl.load(row + _EDGE).to(tl.int32).to(tl.uint32)
    middle = tl.load(source + begin + pixel, mask, 0).to(tl.uint32)
    ends = tl.zeros_like(middle)
    for offset in range(1, radius + 2):
        if VERTICAL:
            previous = tl.maximum(y - offset, 0) * width + x
            next_pixel = tl.minimum(y + offset, height - 1) * width + x
        else:
            previous = y * width + tl.maximum(x - offset, 0)
            next_pixel = y * width + tl.minimum(x + offset, width - 1)
        pair = tl.load(source + begin + previous, mask, 0).to(tl.uint32)
        pair += tl.load(source + begin + next_pixel, mask, 0).to(tl.uint32)
        middle += tl.where(offset <= radius, pair, 0).to(tl.uint32)
        ends = tl.where(offset <= radius, ends, pair)
    blurred = (middle * weight + ends * edge + (1 << 23)) >> 24
    tl.store(target + begin + pixel, blurred.to(tl.uint8), mask)


@triton.jit
def finish_pass(source, target, rows, factors, channels, planes, plane, BLOCK: tl.constexpr):
    """Solarise, normalise and cast one plane, of an image or of a channel that stands alone."""
    image = tl.program_id(2)
    number = image.to(tl.int64) * planes + tl.program_id(1)
    channel = number % channels
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < plane
    begin = number * plane
    x = tl.load(source + begin + pixel, mask, 0).to(tl.float32)
    threshold = tl.load(rows + image * _PARAMETERS + _SOLARISE) * 128.0
    x = tl.where(threshold > 0, tl.where(x >= threshold, 255.0 - x, x), x)
    scale = tl.load(factors + channel)
    shift = tl.load(factors + channels + channel)
    tl.store(target + begin + pixel, (x * scale + shift).to(target.dtype.element_ty), mask)
