"""Crops to views: colour work on uint8 crops as their parameter rows say, then normalisation.

The operations are colour jitter in the drawn order, grey, blur and solarisation. The arithmetic is
Pillow's, to the last bit, because that is what the published numbers were trained on: its enhancers
truncate, its grey is fixed point, its hue turns 8-bit HSV, and its "Gaussian" blur is three box
filters of fractional radius along each axis, each rounded to 8 bits.

`make_views` picks the fastest implementation: the C++ library on a CPU, Triton kernels on a CUDA
device, or the torch operations of this module, which define the numbers and run anywhere.

Images of other than three channels have no colours: each channel is a grey image by itself, whose
brightness and contrast (around its own mean) change with those of the others; saturation, hue and
grey are not asked for (`ViewSpec` holds that).

Shape suffixes: B = rank batch, R = rows that need an operation, C H W = image, T = operations of
the jitter, P = parameters of a view.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.views import native
from mocov3_ds.data.views.spec import ORDERS, PARAMETERS, Column
from mocov3_ds.distributed import devices

_NATIVE_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
_CACHED_VALUES = 1 << 20  # 4 MiB of float32: what a core's cache can hold; measured best


def make_views(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    out_BCHW: Tensor | None = None,
) -> Tensor:
    """Jitter, grey, blur and solarise crops as their rows say, then normalise them.

    Only rows that need an operation pay for it. Which ones is known from the parameters, which stay
    in CPU memory, so nothing waits for the device.

    Args:
        crops_BCHW: uint8 crops on any device.
        params_BP: Parameter rows of `draw.draw_views`, float32, in CPU memory.
        mean: Mean of the pixels in [0, 1], for each channel.
        std: Standard deviation of the pixels in [0, 1], for each channel.
        dtype: Floating-point type of the views.
        out_BCHW: Contiguous tensor of that shape, type and device to write into; None = a new one.

    Returns:
        The views (B, C, H, W) of type `dtype` on the device of the crops.
    """
    assert crops_BCHW.dtype == torch.uint8 and params_BP.shape == (len(crops_BCHW), PARAMETERS)
    if out_BCHW is None:
        out_BCHW = torch.empty(crops_BCHW.shape, dtype=dtype, device=crops_BCHW.device)
    assert out_BCHW.is_contiguous() and out_BCHW.dtype == dtype
    scale_C, shift_C = scale_and_shift(mean, std)
    if crops_BCHW.device.type == "cpu" and dtype in _NATIVE_KINDS and native.is_built():
        inputs = (crops_BCHW, params_BP, scale_C, shift_C)
        crops, params, scale, shift = (x.contiguous().numpy() for x in inputs)
        kind, out = _NATIVE_KINDS[dtype], out_BCHW.data_ptr()
        native.make_views(crops, params, scale, shift, kind, out)
        return out_BCHW
    if crops_BCHW.device.type == "cuda" and not devices.triton_problem(crops_BCHW.device):
        from mocov3_ds.data.views import photometric_triton

        if crops_BCHW.shape[1] != 3:
            crops_BCHW, params_BP = split_channels(crops_BCHW, params_BP)
        return photometric_triton.make_views(crops_BCHW, params_BP, scale_C, shift_C, out_BCHW)
    return make_views_torch(crops_BCHW, params_BP, scale_C, shift_C, out_BCHW)


def make_views_torch(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
    out_BCHW: Tensor,
    cached_values: int = _CACHED_VALUES,
) -> Tensor:
    """`make_views` in torch operations: on any device, and what the faster ones must equal.

    Args:
        crops_BCHW: uint8 crops on any device.
        params_BP: Parameter rows of the crops, float32, in CPU memory.
        scale_C: Factor of a pixel, from `scale_and_shift`.
        shift_C: Summand of a scaled pixel, from `scale_and_shift`.
        out_BCHW: Tensor that the views are written into, also returned.
        cached_values: On a CPU, pixels that are processed at once, to stay in its cache.
    """
    rows = len(crops_BCHW)
    if crops_BCHW.device.type == "cpu":
        rows = max(1, cached_values // crops_BCHW[0].numel())
    for start in range(0, len(crops_BCHW), rows):
        chunk = slice(start, start + rows)
        x_BCHW = _augment(crops_BCHW[chunk].float(), params_BP[chunk])
        out_BCHW[chunk] = _normalise(x_BCHW, scale_C, shift_C)
    return out_BCHW


def augment_crops(crops_BCHW: NDArray[np.uint8], params_BP: NDArray[np.float32]) -> None:
    """Change the colours of uint8 crops in place, as `make_views` does before it normalises.

    Args:
        crops_BCHW: Crops in CPU memory with any strides.
        params_BP: Parameter rows of the crops, with any strides.
    """
    if native.is_built():
        augmented_BCHW = np.ascontiguousarray(crops_BCHW)
        native.augment_crops(augmented_BCHW, np.ascontiguousarray(params_BP))
    else:
        x_BCHW = torch.from_numpy(crops_BCHW).float()
        augmented_BCHW = _augment(x_BCHW, torch.from_numpy(params_BP)).numpy()
    if augmented_BCHW is not crops_BCHW:
        crops_BCHW[:] = augmented_BCHW


def normalise_crops(
    crops_BCHW: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The last step of `make_views` alone, as evaluation needs it: uint8 in, `dtype` out."""
    return _normalise(crops_BCHW.float(), *scale_and_shift(mean, std)).to(dtype)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factor and summand (C,), float32, that turn a pixel 0 .. 255 into its normalised value."""
    scale_C = torch.tensor([1 / (255 * s) for s in std])
    return scale_C, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])


# ----------------------------------------------------------------------- operations on a batch
# Pixels are whole numbers 0 .. 255 in float32; every intermediate whole number stays below 2^24,
# so float32 is exact wherever Pillow computes with integers.


def _augment(x_BCHW: Tensor, params_BP: Tensor) -> Tensor:
    """All operations but the normalisation, in place."""
    if x_BCHW.shape[1] not in (1, 3):
        levels_B1HW, rows_BP = split_channels(x_BCHW, params_BP)
        return _augment(levels_B1HW, rows_BP).view(x_BCHW.shape)
    order_BT = torch.tensor([*ORDERS, (-1,) * 4])[params_BP[:, Column.ORDER].long()]
    for turn, (column, operation) in itertools.product(range(4), enumerate(JITTER_OPERATIONS)):
        wanted_B = order_BT[:, turn] == column
        if column == Column.HUE:
            wanted_B &= params_BP[:, column] >= 0
        for rows_R, device_rows_R in _select_rows(wanted_B, x_BCHW.device):
            factor_R = params_BP[rows_R, column].to(x_BCHW.device, non_blocking=True)
            x_BCHW[device_rows_R] = operation(x_BCHW[device_rows_R], factor_R.view(-1, 1, 1, 1))
    for _, device_rows_R in _select_rows(params_BP[:, Column.GREY] > 0, x_BCHW.device):
        x_BCHW[device_rows_R] = _luma(x_BCHW[device_rows_R]).expand(-1, x_BCHW.shape[1], -1, -1)
    radius_B = params_BP[:, Column.BOX_RADIUS]
    for radius in sorted({int(r) for r in radius_B.tolist() if r >= 0}):
        for rows_R, device_rows_R in _select_rows(radius_B == radius, x_BCHW.device):
            weights_R2 = params_BP[rows_R, Column.BOX_WEIGHT : Column.BOX_EDGE + 1].int()
            weights_R2 = weights_R2.to(x_BCHW.device, non_blocking=True)
            x_BCHW[device_rows_R] = _blur(x_BCHW[device_rows_R], radius, weights_R2)
    solarise_B = params_BP[:, Column.SOLARISE]
    for rows_R, device_rows_R in _select_rows(solarise_B > 0, x_BCHW.device):
        threshold_R = (solarise_B[rows_R] * 128).to(x_BCHW.device, non_blocking=True)
        x_RCHW = x_BCHW[device_rows_R]
        dark_RCHW = x_RCHW < threshold_R.view(-1, 1, 1, 1)
        x_BCHW[device_rows_R] = torch.where(dark_RCHW, x_RCHW, 255 - x_RCHW)
    return x_BCHW


def split_channels(x_BCHW: Tensor, params_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel as an image of its own, (B * C, 1, H, W), with its row (B * C, P)."""
    channels = x_BCHW.shape[1]
    return x_BCHW.flatten(0, 1).unsqueeze(1), params_BP.repeat_interleave(channels, 0)


def _select_rows(mask_B: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (R,) of the set rows, on the CPU and on the device; nothing if there are none."""
    rows_R = mask_B.nonzero().flatten()
    if len(rows_R):
        yield rows_R, rows_R.to(device, non_blocking=True)


def _normalise(x_BCHW: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    scale_C, shift_C = (t.to(x_BCHW.device, non_blocking=True) for t in (scale_C, shift_C))
    return x_BCHW.mul_(scale_C.view(-1, 1, 1)).add_(shift_C.view(-1, 1, 1))


def _luma(x_RCHW: Tensor) -> Tensor:
    """Luma (R, 1, H, W) in Pillow's 16-bit fixed point; a grey image is its own."""
    if x_RCHW.shape[1] == 1:
        return x_RCHW
    r, g, b = x_RCHW.unbind(1)
    luma_RHW = (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471)
    return luma_RHW.add_(32768).mul_(2**-16).floor_().unsqueeze(1)


def _blend(base: Tensor, x_RCHW: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend of a degenerate image with the image: clipped and truncated."""
    return (x_RCHW - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _adjust_brightness(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    return (x_RCHW * factor).clamp_(0, 255).floor_()


def _adjust_contrast(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the rounded mean of the luma."""
    mean = _luma(x_RCHW).double().mean((1, 2, 3), keepdim=True).add_(0.5).floor_().float()
    return _blend(mean, x_RCHW, factor)


def _adjust_saturation(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(x_RCHW), x_RCHW, factor)


def _turn_hue(x_RCHW: Tensor, turn: Tensor) -> Tensor:
    """Turn the 8-bit hue of Pillow's HSV.

    Rounding follows Pillow: distances from the maximum are divided by the chroma one by one, and
    of the two that enter a sector one is 0 or 1, which makes the float64 in Pillow's C superfluous.
    All 2^24 colours agree.
    """
    value, low = x_RCHW.amax(1, keepdim=True), x_RCHW.amin(1, keepdim=True)
    chroma = value - low
    # Distance of each channel from the largest: 0 for that one, 1 for the smallest.
    distance_RCHW = (value - x_RCHW).div_(chroma.clamp(min=1))
    red, green, blue = (distance_RCHW[:, c : c + 1] for c in range(3))
    sector = torch.where(green == 1, 5 - red, 3 + green)
    sector = torch.where(green == 0, torch.where(red == 1, 3 - blue, 1 + red), sector)
    sector = torch.where(red == 0, blue - green, sector)
    # A device divides by a number through its rounded reciprocal, by a tensor exactly.
    sector.div_(torch.full((), 6.0, device=x_RCHW.device))
    hue = torch.where(sector < 0, sector + 1, sector).mul_(255).floor_().add_(turn)
    hue = torch.where(hue >= 256, hue - 256, hue).mul_(6)  # in 1/255 of a sector from here on
    saturation = chroma.mul(255).div_(value.clamp(min=1)).floor_()
    # r, g, b start 5, 3, 1 sectors ahead; a distance of 0 .. 255 from the plateau of the channel
    ahead_C = torch.arange(5 * 255, 0, -2 * 255, device=x_RCHW.device)
    position = hue + ahead_C.view(3, 1, 1)
    position = torch.where(position >= 1530, position - 1530, position)
    weight = torch.minimum(position, 1020 - position).clamp_(0, 255)
    # value * (1 - saturation / 255 * weight / 255), rounded; a grey pixel has saturation 0
    return weight.mul_(-saturation).add_(65025).mul_(value).mul_(1 / 65025).add_(0.5).floor_()


JITTER_OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _adjust_brightness,
    _adjust_contrast,
    _adjust_saturation,
    _turn_hue,
)
"""operation of each of the first four columns: float32 pixels (R, C, H, W) and factors (R, 1, 1, 1)
to changed pixels"""


def _blur(x_RCHW: Tensor, radius: int, weights_R2: Tensor) -> Tensor:
    """Three box passes along each axis, each rounded to 8 bits; borders repeat.

    Integers around zero (pixel - 128) keep the sum of 255 * 2^24 within int32.
    """
    weight, edge = (w.view(-1, 1, 1, 1) for w in weights_R2.unbind(1))
    missing = (1 << 24) - (2 * radius + 1) * weight - 2 * edge  # 0 or 1: the weights are truncated
    rounding = (1 << 23) - 128 * missing
    x_RCHW = x_RCHW.int().sub_(128)
    reach = radius + 1
    for dim in (3, 3, 3, 2, 2, 2):
        size = x_RCHW.shape[dim]
        first, last = x_RCHW.narrow(dim, 0, 1), x_RCHW.narrow(dim, size - 1, 1)
        padded = torch.cat([*[first] * reach, x_RCHW, *[last] * reach], dim)
        total = padded.narrow(dim, reach, size) * weight
        for offset in range(1, reach):
            pair = padded.narrow(dim, reach - offset, size)
            total.addcmul_(pair + padded.narrow(dim, reach + offset, size), weight)
        pair = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * reach, size)
        x_RCHW = total.addcmul_(pair, edge).add_(rounding).bitwise_right_shift_(24)
    return x_RCHW.add_(128).float()
