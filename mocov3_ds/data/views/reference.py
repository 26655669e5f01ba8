"""The yardstick of the loader: the usual pipeline with Pillow, torchvision and DataLoader.

Written plainly from the recipe (BYOL, arXiv 2006.07733, appendix B, as MoCo v3 uses it) with the
tools that its published code is built on, to measure against and to compare pixels with.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io as tv_io
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views import photometric
from mocov3_ds.data.views.photometric import ViewSpec

Box = tuple[int, int, int, int]
BLUR_TAPS = 13
"""of torchvision's tensor blur, three standard deviations at 2 pixels"""


class PillowBlur:
    """Pillow's GaussianBlur with a drawn radius."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def view_transform(spec: ViewSpec, view: int, size: int, normalised: bool = True) -> tv.Compose:
    """Pillow image to the normalised tensor of a view (or to the Pillow image before that)."""
    jitter = tv.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps = [
        tv.RandomResizedCrop(size, (spec.crop_min, spec.crop_max)),
        tv.RandomApply([jitter], spec.jitter_p),
        tv.RandomGrayscale(spec.grey_p),
        tv.RandomApply([PillowBlur(spec.blur_sigma)], spec.blur_p[view]),
        tv.RandomApply([ImageOps.solarize], spec.solarise_p[view]),
        tv.RandomHorizontalFlip(spec.flip_p),
    ]
    if normalised:
        steps += [tv.ToTensor(), tv.Normalize(spec.mean, spec.std)]
    return tv.Compose(steps)


def view_transform_v2(spec: ViewSpec, view: int, size: int) -> v2.Compose:
    """The same on uint8 tensors with torchvision's second set of transforms."""
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    blur = v2.GaussianBlur(BLUR_TAPS, spec.blur_sigma)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (spec.crop_min, spec.crop_max), antialias=True),
            v2.RandomApply([jitter], spec.jitter_p),
            v2.RandomGrayscale(spec.grey_p),
            v2.RandomApply([blur], spec.blur_p[view]),
            v2.RandomSolarize(128, spec.solarise_p[view]),
            v2.RandomHorizontalFlip(spec.flip_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
    )


def open_rgb(data: bytes) -> Image.Image:
    """Decode as the usual image folder does."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_tensor(data: bytes) -> Tensor:
    """Decode to a uint8 (3, H, W) tensor."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = tv_io.decode_image(encoded, tv_io.ImageReadMode.RGB)
    return image


def samples_of(manifest: Manifest) -> Iterator[bytes]:
    """Stored bytes of all samples, from shards in a local folder."""
    for number in range(len(manifest.shards)):
        first, behind = manifest.first_S[number : number + 2]
        with Path(manifest.shard_url(number)).open("rb") as file:
            for row in manifest.index_N[first:behind]:
                file.seek(int(row["offset"]))
                yield file.read(int(row["size"]))


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two views of the image at an index, drawn anew each time."""

    def __init__(
        self, manifest: Manifest, decode: Callable[[bytes], object], both: list[object]
    ) -> None:
        self.manifest, self.decode, self.both = manifest, decode, both

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The two views."""
        shard = int(self.manifest.first_S.searchsorted(index, "right")) - 1
        row = self.manifest.index_N[index]
        with Path(self.manifest.shard_url(shard)).open("rb") as file:
            file.seek(int(row["offset"]))
            data = file.read(int(row["size"]))
        image = self.decode(data)
        first, second = (view(image) for view in self.both)  # type: ignore[operator]
        return first, second


def loader(
    manifest: Manifest, spec: ViewSpec, size: int, batch: int, workers: int, second_set: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The DataLoader of the usual script, over shards in a local folder."""
    transform = view_transform_v2 if second_set else view_transform
    both: list[object] = [transform(spec, view, size) for view in (0, 1)]
    samples = TwoViews(manifest, decode_tensor if second_set else open_rgb, both)
    # Forked workers, as scripts on Linux have, are children whose CPU time can be read.
    context = "fork" if workers else None
    return DataLoader(
        samples, batch, True, num_workers=workers, drop_last=True, multiprocessing_context=context
    )


def drawn_view(image: Image.Image, box: Box, flip: bool, row: Sequence[float], size: int) -> Any:
    """The view that `views.draw` describes, made by Pillow and torchvision: a Pillow image.

    Args:
        image: RGB, whole.
        box: (top, left, height, width), pixels.
        flip: mirror left to right.
        row: parameter row.
        size: side of the view, pixels.
    """
    view = tvf.resized_crop(image, *box, [size, size])
    if flip:
        view = tvf.hflip(view)
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    order = int(row[photometric.ORDER])
    for column in photometric.ORDERS[order] if order >= 0 else ():
        if column == photometric.HUE:
            turn = int(row[photometric.HUE])
            turn = turn - 256 if turn > 127 else turn
            view = tvf.adjust_hue(view, (turn + math.copysign(0.5, turn)) / 255)
        else:
            view = adjust[column](view, row[column])
    if row[photometric.GREY]:
        view = tvf.to_grayscale(view, 3)
    if row[photometric.BOX_RADIUS] >= 0:
        view = view.filter(ImageFilter.GaussianBlur(_sigma_of(row)))
    return ImageOps.solarize(view) if row[photometric.SOLARISE] else view


def _sigma_of(row: Sequence[float]) -> float:
    """A blur whose box filter is the row's: wider ones have a larger radius or less weight."""
    wanted = (int(row[photometric.BOX_RADIUS]), -int(row[photometric.BOX_WEIGHT]))
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        radius, weight, _edge = photometric.box_of(middle)
        if (radius, -weight) < wanted:
            low = middle
        else:
            high = middle
    return high
