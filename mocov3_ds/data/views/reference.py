"""The reference for views: the usual pipeline of Pillow, torchvision and DataLoader.

It follows the recipe (BYOL, arXiv 2006.07733, appendix B, as MoCo v3 uses it) with the tools that
its published code is built on. Benchmarks measure its speed, tests compare its pixels and their
distribution with those of `make_crops`.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
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


class PillowBlur:
    """Pillow's GaussianBlur with a drawn radius."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image by a radius drawn from the range."""
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


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two views of the image at an index, drawn again on each access.

    Args:
        manifest: Manifest of a sharded set in a local folder.
        decode: Function from stored bytes to an image that the transforms take.
        transforms: Functions from that image to view 1 and to view 2.
    """

    def __init__(
        self,
        manifest: Manifest,
        decode: Callable[[bytes], object],
        transforms: Sequence[Callable[[object], Tensor]],
    ) -> None:
        self.manifest, self.decode, self.transforms = manifest, decode, transforms

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
    make_transform = view_transform_v2 if second_set else view_transform
    transforms = [make_transform(spec, view, size) for view in (0, 1)]
    samples = TwoViews(manifest, decode_tensor if second_set else open_rgb, transforms)
    # Forked workers, as scripts on Linux have, are children whose CPU time can be read.
    context = "fork" if workers else None
    return DataLoader(
        samples, batch, True, num_workers=workers, drop_last=True, multiprocessing_context=context
    )


def make_drawn_view(
    image: Image.Image, box: Box, flip: bool, params: Sequence[float], size: int
) -> Image.Image:
    """Make the view that `draw.draw_views` describes with Pillow and torchvision.

    Args:
        image: The stored image in RGB at its full size.
        box: Region of the image that becomes the view.
        flip: Whether to mirror the view left to right.
        params: Parameter row (P,) of the view.
        size: Side of the view in pixels.
    """
    view = tvf.resized_crop(image, *box, [size, size])
    if flip:
        view = tvf.hflip(view)
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    order = int(params[Column.ORDER])
    for column in ORDERS[order] if order >= 0 else ():
        if column == Column.HUE:
            turn = int(params[Column.HUE])
            turn = turn - 256 if turn > 127 else turn
            view = tvf.adjust_hue(view, (turn + math.copysign(0.5, turn)) / 255)
        else:
            view = adjust[column](view, params[column])
    if params[Column.GREY]:
        view = tvf.to_grayscale(view, 3)
    if params[Column.BOX_RADIUS] >= 0:
        view = view.filter(ImageFilter.GaussianBlur(find_sigma(params)))
    return ImageOps.solarize(view) if params[Column.SOLARISE] else view


def find_sigma(params: Sequence[float]) -> float:
    """A standard deviation, pixels, whose box filter is the one of a parameter row."""
    # Wider blurs have a larger radius or, with the same radius, less weight: bisect.
    target = (int(params[Column.BOX_RADIUS]), -int(params[Column.BOX_WEIGHT]))
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        radius, weight, _edge = box_filter(middle)
        if (radius, -weight) < target:
            low = middle
        else:
            high = middle
    return high
