"""Which views are drawn: their distribution, and the numbers that describe a drawn view.

A drawn view is a box of the stored image, a flip and a row of parameters. The columns of that row
and the places of the random numbers are also known to the C++ code (`native/spec.h`); the library
is refused when its numbers are others than those of this module.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # settings are read without these
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Box = tuple[int, int, int, int]
"""a region of the stored image: top, left, height, width, in pixels"""


class Column(IntEnum):
    """Columns of a parameter row.

    All values are whole numbers or float32 factors, so that float32 holds them exactly.
    """

    BRIGHTNESS = 0  # factor
    CONTRAST = 1  # factor
    SATURATION = 2  # factor
    HUE = 3  # turn of the colour circle in 1/256, 0 to 255; -1 = the hue is left alone
    ORDER = 4  # index into ORDERS; -1 = no jitter
    GREY = 5  # 1 = yes
    BOX_RADIUS = 6  # of the blur, see `draw.box_filter`; -1 = no blur
    BOX_WEIGHT = 7  # in 1/2^24
    BOX_EDGE = 8  # weight of the two outermost pixels, in 1/2^24
    SOLARISE = 9  # pixels from 128 times this on are inverted; 0 = none


PARAMETERS = len(Column)
ORDERS = tuple(itertools.permutations(range(4)))
"""orders of the jitter operations, which are the first four columns"""
PLAIN_PARAMS = (1.0, 1.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0)
"""row of a view whose colours stay as they are"""


class Purpose(IntEnum):
    """Place of a drawn quantity in the sequence of random numbers of its view.

    Each quantity has a place of its own, so that a changed probability moves no other draw.
    Attempts of the crop take two places each, from place 0 on.
    """

    DRAW_TOP = 20
    DRAW_LEFT = 21
    DRAW_FLIP = 22
    DRAW_JITTER = 23
    DRAW_ORDER = 24
    DRAW_GREY = 25
    DRAW_BLUR = 26
    DRAW_SIGMA = 27
    DRAW_SOLARISE = 28
    DRAW_FACTORS = 29  # four places, one for each jitter operation


ATTEMPTS = 10
"""tries of a random crop before the central one is taken"""
ASPECT_RATIOS = (3 / 4, 4 / 3)
"""width / height of a crop, drawn uniformly in its logarithm"""
_LOG_RATIO = float.fromhex("0x1.269621134db91p-2")  # log(4/3), the same on any machine

ViewFunction: TypeAlias = "Callable[[Image.Image | NDArray[np.uint8], np.random.Generator], object]"
"""A user's own view of an image; `own_views` says what it gets and returns."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Distribution of the two views of an image; pairs are (view 1, view 2).

    Raises:
        ValueError: a probability or a range is impossible.
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
    aspect: tuple[float, float] = ASPECT_RATIOS
    """range of a crop's width / height, drawn uniformly in its logarithm"""
    solarise_threshold: int = 128
    """pixels from this value on are inverted, of 255"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """mean of the pixels in [0, 1], for each channel; as many as an image has"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """standard deviation of the pixels in [0, 1], for each channel"""
    functions: tuple[ViewFunction, ViewFunction] | None = None
    """functions that make view 1 and view 2 in the place of all above but mean and deviation"""

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    @property
    def log_aspect(self) -> tuple[float, float]:
        """Centre and half width of the range of the logarithm of `aspect`.

        Rounded to 1/2^40, so that it is the same number wherever it is computed.
        """
        if self.aspect == ASPECT_RATIOS:
            return 0.0, _LOG_RATIO
        low, high = (round(math.log(ratio) * 2**40) for ratio in self.aspect)
        return (low + high) / 2**41, (high - low) / 2**41

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
        if not 1 / 16 <= self.aspect[0] <= self.aspect[1] <= 16:
            raise ValueError(f"aspect {self.aspect} of crops must be a range within [1/16, 16].")
        if not 1 <= self.solarise_threshold <= 255:
            raise ValueError(f"solarise threshold {self.solarise_threshold} must be 1 to 255.")
        self._check_channels()

    def _check_channels(self) -> None:
        """Refuse numbers that images of so many channels cannot have."""
        if len(self.std) != self.channels or not self.channels:
            raise ValueError(
                f"{self.channels} means and {len(self.std)} deviations: each channel has both."
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ValueError(
                f"means {self.mean} must be numbers, deviations {self.std} positive ones."
            )
        changes_colours = self.saturation or self.hue or self.grey_p
        if self.functions is None and self.channels != 3 and changes_colours:
            raise ValueError(
                f"images of {self.channels} channels have no colours: saturation, hue and grey_p "
                "must be 0."
            )
