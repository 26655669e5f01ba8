"""What do smaller shards cost a view: bytes saved, and how near and how sharp the same crops are?

    python -m mocov3_ds.bench resized SRC

SRC is a folder of class folders or a tar of them. Boxes are drawn as training draws them. Each is
cut from the original and from the image as `data_prep shard --resize N --reencode` writes it, and
both are brought to the size of a view by Pillow. PSNR is over all pixels of all crops of a range of
areas. Sharpness is the mean absolute Laplacian of the crops from the smaller image over that of the
crops from the original.

Shape suffixes: H W C = image.
"""

import io
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_prep.images import shrink_image
from data_prep.sources import list_images
from mocov3_ds.bench.shard import read_image
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec

_AREAS = (0.08, 0.15, 0.3, 0.6, 1.0)
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ResizedOptions:
    """Quality of views from resized shards."""

    source: tyro.conf.Positional[str]
    """folder of class folders, or a tar of them"""
    under: str = ""
    """take only what lies in this folder of the source"""
    images: int = 500
    """images that are compared, spread over the source"""
    sides: tuple[int, ...] = (500, 384, 320, 256)
    """lengths of the shorter side to try, pixels"""
    quality: int = 90
    """quality of the JPEG"""
    size: int = 224
    """side of a view, pixels"""


@dataclass
class Similarity:
    """Sums over the crops of one range of areas."""

    squares: float = 0.0
    """squared differences of the pixels"""
    values: int = 0
    """number of pixel values"""
    edges: float = 0.0
    """Laplacians of the crops from the smaller image"""
    original_edges: float = 0.0

    def add_crop(self, original_HWC: NDArray[np.float32], smaller_HWC: NDArray[np.float32]) -> None:
        """Add a crop of the original and the same crop of the smaller image."""
        self.squares += float(np.square(original_HWC - smaller_HWC).sum(dtype=np.float64))
        self.values += original_HWC.size
        self.edges += mean_laplacian(smaller_HWC)
        self.original_edges += mean_laplacian(original_HWC)

    def __str__(self) -> str:
        if not self.squares:
            return "the same" if self.values else "none"
        psnr = 10 * np.log10(255**2 * self.values / self.squares)
        return f"{psnr:.1f} / {self.edges / self.original_edges:.2f}"


def mean_laplacian(image_HWC: NDArray[np.float32]) -> float:
    """Mean absolute difference of a pixel from its four neighbours' mean, times four."""
    inner = 4 * image_HWC[1:-1, 1:-1]
    around = image_HWC[:-2, 1:-1] + image_HWC[2:, 1:-1] + image_HWC[1:-1, :-2] + image_HWC[1:-1, 2:]
    return float(np.abs(inner - around).mean())


def compare_crops(
    original: bytes, smaller: bytes, size: int, sample: int, similarities: list[Similarity]
) -> None:
    """Cut the two crops that training draws for `sample` from both images, and add them.

    Args:
        original: bytes of the source image.
        smaller: bytes of the same image, resized.
        size: side of a view, pixels.
        sample: number of the sample, which decides the draws.
        similarities: sums for each range of areas in `_AREAS`.
    """
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in (original, smaller)]
    width, height = images[0].size
    boxes, _, _ = draw_views(ViewSpec(), _SEED, 0, sample, height, width)
    for box in boxes:
        share = box[2] * box[3] / (height * width)
        crops = [_cut_crop(image, box, (width, height), size) for image in images]
        similarities[int(np.searchsorted(_AREAS[1:-1], share))].add_crop(*crops)


def _cut_crop(
    image: Image.Image, box: tuple[int, int, int, int], full_size: tuple[int, int], size: int
) -> NDArray[np.float32]:
    """The part of an image that is `box` in one of `full_size` (width, height), resized.

    Args:
        image: the image, of any size.
        box: y, x, height and width of the part in the image of full size, pixels.
        full_size: width and height of the original image, pixels.
        size: side of the returned crop, pixels.
    """
    y, x, height, width = box
    scale_x, scale_y = image.width / full_size[0], image.height / full_size[1]
    corners = (x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)
    return np.asarray(
        image.resize((size, size), Image.Resampling.BILINEAR, box=corners), np.float32
    )


def run_bench(options: ResizedOptions) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        listing = list_images(options.source, under=options.under, scratch_folder=Path(folder))
        rows = np.unique(np.linspace(0, len(listing) - 1, options.images).astype(int))
        similarities = {side: [Similarity() for _ in _AREAS[1:]] for side in options.sides}
        sizes = dict.fromkeys(options.sides, 0)
        total = 0
        for row in tqdm(rows.tolist(), unit="image"):
            _, original = read_image(listing, row)
            total += len(original)
            for side in options.sides:
                smaller = shrink_image(original, side, options.quality, always=True) or original
                sizes[side] += len(smaller)
                compare_crops(original, smaller, options.size, row, similarities[side])
    ranges = [f"{low:.0%} - {high:.0%}" for low, high in itertools.pairwise(_AREAS)]
    print(f"{len(rows)} images of {total / len(rows) / 1e3:.0f} kB; PSNR in dB / sharpness\n")
    print(f"| shorter side | kB an image | of the bytes | {' | '.join(ranges)} |")
    print(f"| --- | --- | --- |{' --- |' * len(ranges)}")
    for side in options.sides:
        cells = " | ".join(map(str, similarities[side]))
        kilobytes = sizes[side] / len(rows) / 1e3
        print(f"| {side} | {kilobytes:.0f} | {sizes[side] / total:.0%} | {cells} |")
