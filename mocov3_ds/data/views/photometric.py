"""The random half of a view: what is drawn for it, and the colour work on its crop.

    decode.size_of -> views.draw -> decode.two_crops (uint8 crops, flipped) -> views.photometric

The recipe is BYOL's asymmetric one (arXiv 2006.07733, App. B) as MoCo v3 uses it: random resized
crop, colour jitter in a drawn order, grey, blur, solarisation, flip, normalisation. The arithmetic
is Pillow's, to the last bit, because that is what the published numbers were trained on: its
enhancers truncate, its grey is fixed point, its hue turns 8-bit HSV, and its "Gaussian" blur is
three box filters of fractional radius along each axis, each rounded to 8 bits.

Every random number is a hash of (seed, epoch, sample, view, purpose), so a view depends on nothing
else: not on the rank, the thread, the place in the batch or a resume. Only operations that IEEE 754
rounds correctly are used in `draw`, so that any other writing of it gives the same bits.

Shape suffixes: V = the two views, B = rank batch, R = rows that need an operation, C H W = image,
P = parameters of a view.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.views import native

Box = tuple[int, int, int, int]

# Columns of a parameter row. All are whole numbers or float32 factors, so float32 holds them.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factors; HUE is a turn in 1/256, 0 to 255
ORDER = 4  # index into ORDERS; -1 = no jitter
GREY = 5  # 1 = yes
BOX_RADIUS, BOX_WEIGHT, BOX_EDGE = 6, 7, 8  # see `box_of`; radius -1 = no blur
SOLARISE = 9  # 1 = yes
PARAMETERS = 10

ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
RATIO = (3 / 4, 4 / 3)  # width / height of a crop, drawn uniformly in its logarithm
_PLAIN_ROW = (1.0, 1.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0)

# Purposes: each drawn quantity has its own place in the sequence of its view, so that a changed
# probability shifts no other draw. Attempts of the crop take two places each.
_ATTEMPTS = 10
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _SOLARISE = range(20, 29)
_FACTORS = 29  # four places
_MASK = (1 << 64) - 1
_LOG_RATIO = float.fromhex("0x1.269621134db91p-2")  # log(4/3), the same on any machine
_TAYLOR = tuple(1 / math.factorial(n) for n in range(13, -1, -1))


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Distribution of the two views of an image; pairs are (view 1, view 2).

    Raises:
        ValueError: a probability or range that cannot be.
    """

    crop_min: float = 0.08
    """smallest crop, as a share of the image area"""
    crop_max: float = 1.0
    """largest crop, as a share of the image area"""
    brightness: float = 0.4
    """factor drawn from [1 - x, 1 + x]"""
    contrast: float = 0.4
    """factor drawn from [1 - x, 1 + x]"""
    saturation: float = 0.2
    """factor drawn from [1 - x, 1 + x]"""
    hue: float = 0.1
    """turn drawn from [-x, x], as a share of the colour circle"""
    jitter_p: float = 0.8
    """probability that the four above happen"""
    grey_p: float = 0.2
    """probability of a grey view"""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """probability of the blur"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, pixels"""
    solarise_p: tuple[float, float] = (0.0, 0.2)
    """probability of solarisation"""
    flip_p: float = 0.5
    """probability of a horizontal flip"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """of the pixels in [0, 1], per channel"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """of the pixels in [0, 1], per channel"""

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= self.crop_max <= 1:
            raise ValueError(
                f"crops from {self.crop_min} to {self.crop_max} of the image area are impossible; "
                "give 0 < crop_min <= crop_max <= 1."
            )
        chances = (self.jitter_p, self.grey_p, self.flip_p, *self.blur_p, *self.solarise_p)
        if not all(0 <= p <= 1 for p in chances):
            raise ValueError(f"probabilities of the views {chances} must lie in [0, 1].")
        strengths = (self.brightness, self.contrast, self.saturation)
        if not all(0 <= x <= 1 for x in strengths) or not 0 <= self.hue <= 0.5:
            raise ValueError(
                f"jitter of brightness, contrast, saturation {strengths} must lie in [0, 1] and of "
                f"hue ({self.hue}) in [0, 0.5]."
            )
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= 16:
            raise ValueError(f"blur sigma {self.blur_sigma} must be a range within [0, 16] pixels.")


def draw(
    spec: ViewSpec, seed: int, epoch: int, sample_id: int, height: int, width: int
) -> tuple[list[Box], list[bool], NDArray[np.float32]]:
    """Everything random about the two views of a sample.

    Args:
        spec: distribution.
        seed: of the run.
        epoch: pass over the data.
        sample_id: of the sample in its manifest.
        height: of the stored image, pixels.
        width: of the stored image, pixels.

    Returns:
        Boxes (top, left, height, width) in pixels of the stored image, flips, and the parameter
        rows (2, P), float32, of `photometric`.
    """
    sample_key = _key(seed, epoch, sample_id)
    boxes, flips, rows = [], [], []
    for view in (0, 1):
        key = _mix(sample_key + view)
        boxes.append(_draw_box(key, spec.crop_min, spec.crop_max, height, width))
        flips.append(_uniform(key, _FLIP) < spec.flip_p)
        rows.append(_draw_row(key, spec, view))
    return boxes, flips, np.array(rows, dtype=np.float32)


def photometric(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    out_BCHW: Tensor | None = None,
) -> Tensor:
    """Jitter, grey, blur and solarise a batch of crops as their rows say, then normalise.

    Only rows that need an operation pay for it. Which ones is known from the parameters, which stay
    in CPU memory, so nothing waits for the device.

    Args:
        crops_BCHW: uint8, on any device.
        params_BP: float32 rows of `draw`, on the CPU.
        mean: of the pixels in [0, 1], per channel.
        std: of the pixels in [0, 1], per channel.
        dtype: of the result.
        out_BCHW: contiguous tensor of that shape, dtype and device to write into; None = a new one.

    Returns:
        (B, C, H, W) of `dtype` on the crops' device.
    """
    assert crops_BCHW.dtype == torch.uint8 and params_BP.shape == (len(crops_BCHW), PARAMETERS)
    if out_BCHW is None:
        out_BCHW = torch.empty(crops_BCHW.shape, dtype=dtype, device=crops_BCHW.device)
    assert out_BCHW.is_contiguous() and out_BCHW.dtype == dtype
    if crops_BCHW.device.type == "cpu" and native.ready() and dtype in _NATIVE_KINDS:
        return _photometric_native(crops_BCHW, params_BP, mean, std, out_BCHW)
    if crops_BCHW.device.type == "cuda" and find_spec("triton"):
        from mocov3_ds.data.views import photometric_triton

        return photometric_triton.photometric(crops_BCHW, params_BP, mean, std, out_BCHW)
    return photometric_torch(crops_BCHW, params_BP, mean, std, out_BCHW)


def augment(crops_BCHW: NDArray[np.uint8], params_BP: NDArray[np.float32]) -> None:
    """The colour work of `photometric` alone, in place, in CPU memory; any strides."""
    if native.ready():
        whole_BCHW = np.ascontiguousarray(crops_BCHW)
        native.augment(whole_BCHW, np.ascontiguousarray(params_BP))
    else:
        x_BCHW = torch.from_numpy(crops_BCHW).float()
        whole_BCHW = _augment(x_BCHW, torch.from_numpy(params_BP)).numpy()
    if whole_BCHW is not crops_BCHW:
        crops_BCHW[:] = whole_BCHW


def photometric_torch(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out_BCHW: Tensor,
) -> Tensor:
    """`photometric` in torch operations: on any device, and what the faster ones must equal."""
    rows = len(crops_BCHW)
    if crops_BCHW.device.type == "cpu":  # keep the intermediate images in the core's cache
        rows = max(1, _CACHED_VALUES // crops_BCHW[0].numel())
    for start in range(0, len(crops_BCHW), rows):
        part = slice(start, start + rows)
        x_BCHW = _augment(crops_BCHW[part].float(), params_BP[part])
        out_BCHW[part] = _normalise(x_BCHW, mean, std)
    return out_BCHW


def normalise(
    crops_BCHW: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The last step of `photometric` alone, as evaluation needs it: uint8 in, `dtype` out."""
    return _normalise(crops_BCHW.float(), mean, std).to(dtype)


def box_of(sigma: float) -> tuple[int, int, int]:
    """Pillow's box filter for a blur: whole radius r, weight and edge weight in 1/2^24.

    A pass replaces a pixel by weight * (the 2r + 1 pixels around it) + edge * (the next two).
    Precision follows Pillow: float32 variables, float64 where a C expression widens.
    """
    f32 = np.float32
    variance = f32(sigma) * f32(sigma) / f32(3)
    length = f32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = f32(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    radius = whole + part
    weight = int(f32(1 << 24) / (radius * 2 + 1))
    return int(radius), weight, ((1 << 24) - (2 * int(radius) + 1) * weight) // 2


# ------------------------------------------------------------------------------------- random draws


def _mix(word: int) -> int:
    """A well-mixed 64-bit hash: one step of SplitMix64 (Steele et al., 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _key(seed: int, epoch: int, sample_id: int) -> int:
    return _mix(_mix(_mix(seed) + epoch) + sample_id)


def _uniform(key: int, purpose: int) -> float:
    """In [0, 1), a multiple of 2^-53."""
    return (_mix(key + purpose) >> 11) * 2.0**-53


def _below(key: int, purpose: int, bound: int) -> int:
    """In 0 .. bound - 1."""
    return ((_mix(key + purpose) >> 32) * bound) >> 32


def _exp(x: float) -> float:
    """exp(x) for |x| < 0.3 by its series: the same bits in any language, unlike a libm's."""
    total = 0.0
    for coefficient in _TAYLOR:
        total = total * x + coefficient
    return total


def _draw_box(key: int, crop_min: float, crop_max: float, height: int, width: int) -> Box:
    """Random resized crop as torchvision draws it: ten attempts, then the central fallback."""
    for attempt in range(_ATTEMPTS):
        share = crop_min + (crop_max - crop_min) * _uniform(key, 2 * attempt)
        ratio = _exp((2 * _uniform(key, 2 * attempt + 1) - 1) * _LOG_RATIO)
        area = share * (height * width)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = _below(key, _TOP, height - crop_height + 1)
            left = _below(key, _LEFT, width - crop_width + 1)
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < RATIO[0]:
        crop_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        crop_width = round(height * RATIO[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_row(key: int, spec: ViewSpec, view: int) -> tuple[float, ...]:
    """Parameter row of one view."""
    row = list(_PLAIN_ROW)
    if _uniform(key, _JITTER) < spec.jitter_p:
        strengths = (spec.brightness, spec.contrast, spec.saturation)
        for column, strength in enumerate(strengths):
            row[column] = 1 - strength + 2 * strength * _uniform(key, _FACTORS + column)
        turn = spec.hue * (2 * _uniform(key, _FACTORS + HUE) - 1)
        row[HUE] = int(turn * 255) & 255  # torchvision's truncation and 8-bit wrap
        row[ORDER] = _below(key, _ORDER, len(ORDERS))
    row[GREY] = _uniform(key, _GREY) < spec.grey_p
    if _uniform(key, _BLUR) < spec.blur_p[view]:
        low, high = spec.blur_sigma
        row[BOX_RADIUS : BOX_EDGE + 1] = box_of(low + (high - low) * _uniform(key, _SIGMA))
    row[SOLARISE] = _uniform(key, _SOLARISE) < spec.solarise_p[view]
    return tuple(row)


# ------------------------------------------------------------------------- operations on whole rows
# Pixels are whole numbers 0 .. 255 in float32; every intermediate whole number stays below 2^24,
# so float32 is exact wherever Pillow computes with integers.

_NATIVE_KINDS: dict[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}
_CACHED_VALUES = 1 << 20  # 4 MiB of float32: what a core's cache can hold; measured best


def _augment(x_BCHW: Tensor, params_BP: Tensor) -> Tensor:
    """All operations but the normalisation, in place."""
    order_B = params_BP[:, ORDER].long()
    order_BT = torch.tensor([*ORDERS, (-1,) * 4])[order_B]
    for turn, column in itertools.product(range(4), (BRIGHTNESS, CONTRAST, SATURATION, HUE)):
        for rows_R, at_R in _rows(order_BT[:, turn] == column, x_BCHW.device):
            factor_R = params_BP[rows_R, column].to(x_BCHW.device, non_blocking=True)
            x_BCHW[at_R] = _JITTER_OPERATIONS[column](x_BCHW[at_R], factor_R.view(-1, 1, 1, 1))
    for _, at_R in _rows(params_BP[:, GREY] > 0, x_BCHW.device):
        x_BCHW[at_R] = _grey(x_BCHW[at_R]).expand(-1, 3, -1, -1)
    radius_B = params_BP[:, BOX_RADIUS]
    for radius in sorted({int(r) for r in radius_B.tolist() if r >= 0}):
        for rows_R, at_R in _rows(radius_B == radius, x_BCHW.device):
            box_R2 = params_BP[rows_R, BOX_WEIGHT : BOX_EDGE + 1].int()
            box_R2 = box_R2.to(x_BCHW.device, non_blocking=True)
            x_BCHW[at_R] = _blur(x_BCHW[at_R], radius, box_R2)
    for _, at_R in _rows(params_BP[:, SOLARISE] > 0, x_BCHW.device):
        x_RCHW = x_BCHW[at_R]
        x_BCHW[at_R] = torch.where(x_RCHW < 128, x_RCHW, 255 - x_RCHW)
    return x_BCHW


def _rows(mask_B: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of the set rows, on the CPU and on the device; nothing when there are none."""
    rows_R = mask_B.nonzero().flatten()
    if len(rows_R):
        yield rows_R, rows_R.to(device, non_blocking=True)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of a channel's pixel to its normalised value, float32 (C,) each."""
    scale_C = torch.tensor([1 / (255 * s) for s in std])
    return scale_C, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])


def _photometric_native(
    crops_BCHW: Tensor,
    params_BP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out_BCHW: Tensor,
) -> Tensor:
    """`photometric` in the extension."""
    images_BCHW, rows_BP = crops_BCHW.contiguous().numpy(), params_BP.contiguous().numpy()
    scale_C, shift_C = (t.numpy() for t in scale_and_shift(mean, std))
    kind = _NATIVE_KINDS[out_BCHW.dtype]
    native.photometric(images_BCHW, rows_BP, scale_C, shift_C, kind, out_BCHW.data_ptr())
    return out_BCHW


def _normalise(x_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    scale_C, shift_C = scale_and_shift(mean, std)
    scale_C, shift_C = (t.to(x_BCHW.device, non_blocking=True) for t in (scale_C, shift_C))
    return x_BCHW.mul_(scale_C.view(3, 1, 1)).add_(shift_C.view(3, 1, 1))


def _grey(x_RCHW: Tensor) -> Tensor:
    """Luma (R, 1, H, W) in Pillow's 16-bit fixed point."""
    r, g, b = x_RCHW.unbind(1)
    grey_RHW = (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471)
    return grey_RHW.add_(32768).mul_(2**-16).floor_().unsqueeze(1)


def _blend(base: Tensor, x_RCHW: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend of a degenerate image with the image: clipped and truncated."""
    return (x_RCHW - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _brightness(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    return (x_RCHW * factor).clamp_(0, 255).floor_()


def _contrast(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the rounded mean of the luma."""
    mean = _grey(x_RCHW).double().mean((1, 2, 3), keepdim=True).add_(0.5).floor_().float()
    return _blend(mean, x_RCHW, factor)


def _saturation(x_RCHW: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x_RCHW), x_RCHW, factor)


def _hue(x_RCHW: Tensor, turn: Tensor) -> Tensor:
    """Turn the 8-bit hue of Pillow's HSV.

    Rounding follows Pillow: distances from the maximum are divided by the chroma one by one, and
    of the two that enter a sector one is 0 or 1, which makes the float64 in Pillow's C superfluous.
    All 2^24 colours agree.
    """
    value, low = x_RCHW.amax(1, keepdim=True), x_RCHW.amin(1, keepdim=True)
    chroma = value - low
    apart_RCHW = (value - x_RCHW).div_(chroma.clamp(min=1))
    red, green, blue = (
        apart_RCHW[:, c : c + 1] for c in range(3)
    )  # 0 at the maximum, 1 at the minimum
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
    place = hue + ahead_C.view(3, 1, 1)
    place = torch.where(place >= 1530, place - 1530, place)
    weight = torch.minimum(place, 1020 - place).clamp_(0, 255)
    # value * (1 - saturation / 255 * weight / 255), rounded; a grey pixel has saturation 0
    return weight.mul_(-saturation).add_(65025).mul_(value).mul_(1 / 65025).add_(0.5).floor_()


_JITTER_OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _brightness,
    _contrast,
    _saturation,
    _hue,
)


def _blur(x_RCHW: Tensor, radius: int, box_R2: Tensor) -> Tensor:
    """Three box passes along each axis, each rounded to 8 bits; borders repeat.

    Integers around zero (pixel - 128) keep the sum of 255 * 2^24 within int32.
    """
    weight, edge = (w.view(-1, 1, 1, 1) for w in box_R2.unbind(1))
    missing = (1 << 24) - (2 * radius + 1) * weight - 2 * edge  # 0 or 1: the weights are truncated
    rounding = (1 << 23) - 128 * missing
    x_RCHW = x_RCHW.int().sub_(128)
    reach = radius + 1
    for dim in (3, 3, 3, 2, 2, 2):
        size = x_RCHW.shape[dim]
        first, last = x_RCHW.narrow(dim, 0, 1), x_RCHW.narrow(dim, size - 1, 1)
        padded = torch.cat([*[first] * reach, x_RCHW, *[last] * reach], dim)
        total = padded.narrow(dim, reach, size) * weight
        for offset in range(1, radius + 1):
            pair = padded.narrow(dim, reach - offset, size) + padded.narrow(
                dim, reach + offset, size
            )
            total.addcmul_(pair, weight)
        pair = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * reach, size)
        x_RCHW = total.addcmul_(pair, edge).add_(rounding).bitwise_right_shift_(24)
    return x_RCHW.add_(128).float()
