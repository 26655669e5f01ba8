"""The reference for views: the usual pipeline of Pillow, torchvision and DataLoader.

It follows the recipe (BYOL, arXiv 2006.07733, appendix B, as MoCo v3 uses it) with the tools that
its published code is built on. Benchmarks measure its speed, tests compare its pixels and their
distribution with those of `make_crops`.
"""

import io
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io as tv_io
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.draw import box_filter
from mocov3_ds.data.views.spec import ORDERS, Box, Column, ViewSpec

BLUR_TAPS = 13
"""width of torchvision's tensor blur: three standard deviations of 2 pixels to each side"""


@dataclass(frozen=True)
class PillowBlur:
    """Pillow's GaussianBlur with a radius drawn from the range `sigma`."""

    sigma: tuple[float, float]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image by a radius drawn from the range."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def view_transform(
    spec: ViewSpec,
    view: int,
    size: int | tuple[int, int],
    *,
    second_set: bool = False,
    normalised: bool = True,
) -> tv.Compose | v2.Compose:
    """Stored image to the normalised tensor of a view.

    Args:
        spec: Distribution of the views.
        view: Index of the view, 0 or 1.
        size: Side of the view in pixels, or its height and width.
        second_set: Whether to use torchvision's second set of transforms on uint8 tensors, rather
            than the first set on Pillow images.
        normalised: Whether to end with the normalisation, rather than with the image before it.
    """
    kit = v2 if second_set else tv
    jitter = kit.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    sigma = spec.blur_sigma
    blur = kit.GaussianBlur(BLUR_TAPS, sigma) if second_set else PillowBlur(sigma)
    steps = [
        kit.RandomResizedCrop(size, (spec.crop_min, spec.crop_max), spec.aspect),
        kit.RandomApply([jitter], spec.jitter_p),
        kit.RandomGrayscale(spec.grey_p),
        kit.RandomApply([blur], spec.blur_p[view]),
        kit.RandomSolarize(spec.solarise_threshold, spec.solarise_p[view]),
        kit.RandomHorizontalFlip(spec.flip_p),
    ]
    if normalised:
        to_tensor = v2.ToDtype(torch.float32, scale=True) if second_set else tv.ToTensor()
        steps += [to_tensor, kit.Normalize(spec.mean, spec.std)]
    return kit.Compose(steps)


def open_rgb(image_bytes: bytes) -> Image.Image:
    """Decode as the usual image folder does."""
    return Image.open(io.BytesIO(image_bytes)).convert("RGB")


def decode_tensor(image_bytes: bytes) -> Tensor:
    """Decode to a uint8 (3, H, W) tensor."""
    encoded = torch.frombuffer(bytearray(image_bytes), dtype=torch.uint8)
    return tv_io.decode_image(encoded, tv_io.ImageReadMode.RGB)


def read_samples(manifest: Manifest) -> Iterator[bytes]:
    """Yield the stored bytes of all samples, from shards in a local folder."""
    return (_read_sample(manifest, sample) for sample in range(manifest.samples))


def _read_sample(manifest: Manifest, sample: int) -> bytes:
    """Stored bytes of a sample, from a shard in a local folder."""
    shard = int(manifest.first_S.searchsorted(sample, "right")) - 1
    row = manifest.index_N[sample]
    with Path(manifest.shard_url(shard)).open("rb") as file:
        file.seek(int(row["offset"]))
        return file.read(int(row["size"]))


@dataclass(frozen=True)
class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two views of the image at an index, drawn again on each access.

    Args:
        manifest: Manifest of a sharded set in a local folder.
        decode: Function from stored bytes to an image that the transforms take.
        transforms: Functions from that image to view 1 and to view 2.
    """

    manifest: Manifest
    decode: Callable[[bytes], object]
    transforms: Sequence[Callable[[object], Tensor]]

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The two views."""
        image = self.decode(_read_sample(self.manifest, index))
        first, second = (transform(image) for transform in self.transforms)
        return first, second


def make_loader(
    manifest: Manifest, spec: ViewSpec, size: int, batch: int, workers: int, second_set: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The DataLoader of the usual script, over shards in a local folder.

    Args:
        manifest: Manifest of a sharded set in a local folder.
        spec: Distribution of the views.
        size: Side of a view in pixels.
        batch: Samples in a batch; the last, smaller one is dropped.
        workers: Number of processes that decode; 0 = the caller's own.
        second_set: Whether to use torchvision's second set of transforms.
    """
    transforms = [view_transform(spec, view, size, second_set=second_set) for view in (0, 1)]
    samples = TwoViews(manifest, decode_tensor if second_set else open_rgb, transforms)
    # Forked workers, as scripts on Linux have, are children whose CPU time can be read.
    context = "fork" if workers else None
    return DataLoader(
        samples, batch, True, num_workers=workers, drop_last=True, multiprocessing_context=context
    )


def make_drawn_view(
    image: Image.Image,
    box: Box,
    flip: bool,
    params: Sequence[float],
    size: int | tuple[int, int],
) -> Image.Image:
    """Make the view that `draw.draw_views` describes with Pillow and torchvision.

    Args:
        image: The stored image at its full size, in RGB, or in grey: each channel of an image that
            has others.
        box: Region of the image that becomes the view.
        flip: Whether to mirror the view left to right.
        params: Parameter row (P,) of the view.
        size: Side of the view in pixels, or its height and width.
    """
    view = tvf.resized_crop(image, *box, [size, size] if isinstance(size, int) else [*size])
    if flip:
        view = tvf.hflip(view)
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    order = int(params[Column.ORDER])
    for column in ORDERS[order] if order >= 0 else ():
        if column == Column.HUE and params[Column.HUE] < 0:
            continue
        if column == Column.HUE:
            turn = int(params[Column.HUE])
            turn = turn - 256 if turn > 127 else turn
            view = tvf.adjust_hue(view, (turn + math.copysign(0.5, turn)) / 255)
        else:
            view = adjust[column](view, params[column])
    if params[Column.GREY]:
        view = tvf.to_grayscale(view, len(view.getbands()))
    if params[Column.BOX_RADIUS] >= 0:
        view = view.filter(ImageFilter.GaussianBlur(find_sigma(params)))
    threshold = int(128 * params[Column.SOLARISE])
    return ImageOps.solarize(view, threshold) if threshold else view


def find_sigma(params: Sequence[float]) -> float:
    """A standard deviation, pixels, whose box filter is the one of a parameter row."""
    # Wider blurs have a larger radius or, with the same radius, less weight: bisect.
    target = (int(params[Column.BOX_RADIUS]), -int(params[Column.BOX_WEIGHT]))
    steps = 1 << 40  # of a pixel, finer than float32

    def order_by_width(number: int) -> tuple[int, int]:
        radius, weight, _edge = box_filter(number / steps)
        return radius, -weight

    return bisect_left(range(16 * steps), target, key=order_by_width) / steps
