"""What smaller shards cost a view: bytes saved, and how far and how sharp the same crops still are.

    python -m mocov3_ds.bench resized SRC

SRC is a folder of class folders or a tar of them. Boxes are drawn as training draws them; each is
cut from the original and from the image as `data_prep shard --resize N --reencode` writes it, and
both are brought to the size of a view by Pillow. PSNR is over all pixels of all
crops of an area; sharpness is the mean absolute Laplacian of those from the smaller image over that
of those from the original.
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

from data_prep import images
from data_prep.sources import list_images
from mocov3_ds.bench.shard import image_at
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec

_AREAS = (0.08, 0.15, 0.3, 0.6, 1.0)
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Quality of views from resized shards."""

    source: tyro.conf.Positional[str]
    """folder of class folders, or a tar of them"""
    under: str = ""
    """take only what lies in this folder of the source"""
    images: int = 500
    """images looked at, spread over the source"""
    sides: tuple[int, ...] = (500, 384, 320, 256)
    """longest shorter sides to try, pixels"""
    quality: int = 90
    """of the JPEG"""
    size: int = 224
    """side of a view, pixels"""


@dataclass
class Seen:
    """Sums over the crops of one range of areas."""

    squares: float = 0.0
    values: int = 0
    edges: float = 0.0
    edges_before: float = 0.0

    def add(self, before_HWC: NDArray[np.float32], after_HWC: NDArray[np.float32]) -> None:
        """Take note of a crop of the original and the same of the smaller image."""
        self.squares += float(np.square(before_HWC - after_HWC).sum(dtype=np.float64))
        self.values += before_HWC.size
        self.edges += laplacian(after_HWC)
        self.edges_before += laplacian(before_HWC)

    def __str__(self) -> str:
        if not self.squares:
            return "the same" if self.values else "none"
        psnr = 10 * np.log10(255**2 * self.values / self.squares)
        return f"{psnr:.1f} / {self.edges / self.edges_before:.2f}"


def laplacian(image_HWC: NDArray[np.float32]) -> float:
    """Mean absolute difference of a pixel from its four neighbours' mean, times four."""
    inner = 4 * image_HWC[1:-1, 1:-1]
    around = image_HWC[:-2, 1:-1] + image_HWC[2:, 1:-1] + image_HWC[1:-1, :-2] + image_HWC[1:-1, 2:]
    return float(np.abs(inner - around).mean())


def compare(original: bytes, smaller: bytes, size: int, sample: int, seen: list[Seen]) -> None:
    """Cut the two crops that training draws for `sample` from both, and add them to `seen`.

    Args:
        original: bytes of the source image.
        smaller: of the same image, resized.
        size: side of a view, pixels.
        sample: which draws.
        seen: one for each range of areas of `_AREAS`.
    """
    before, after = (Image.open(io.BytesIO(data)).convert("RGB") for data in (original, smaller))
    boxes, _, _ = draw_views(ViewSpec(), _SEED, 0, sample, before.height, before.width)
    for top, left, height, width in boxes:
        share = height * width / (before.height * before.width)
        place = int(np.searchsorted(_AREAS[1:-1], share))
        seen[place].add(
            *(
                _crop(image, (top, left, height, width), before.size, size)
                for image in (before, after)
            )
        )


def _crop(
    image: Image.Image, box: tuple[int, int, int, int], of: tuple[int, int], size: int
) -> NDArray[np.float32]:
    """The part of an image that is `box` in one of `of`'s width and height, resized."""
    top, left, height, width = box
    x, y = image.width / of[0], image.height / of[1]
    corners = (left * x, top * y, (left + width) * x, (top + height) * y)
    return np.asarray(
        image.resize((size, size), Image.Resampling.BILINEAR, box=corners), np.float32
    )


def command() -> None:
    """Entry point of the benchmark."""
    options = tyro.cli(Options, prog="python -m mocov3_ds.bench resized", description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        listing = list_images(options.source, under=options.under, scratch_folder=Path(folder))
        places = np.unique(np.linspace(0, len(listing) - 1, options.images).astype(int))
        seen = {side: [Seen() for _ in _AREAS[1:]] for side in options.sides}
        sizes = dict.fromkeys(options.sides, 0)
        whole = 0
        for place in tqdm(places.tolist(), unit="image"):
            _, data = image_at(listing, place)
            whole += len(data)
            for side in options.sides:
                smaller = images.shrunk(data, side, options.quality, always=True) or data
                sizes[side] += len(smaller)
                compare(data, smaller, options.size, place, seen[side])
    ranges = [f"{a:.0%} - {b:.0%}" for a, b in itertools.pairwise(_AREAS)]
    print(f"{len(places)} images of {whole / len(places) / 1e3:.0f} kB; PSNR in dB / sharpness\n")
    print(f"| shorter side | kB an image | of the bytes | {' | '.join(ranges)} |")
    print(f"| --- | --- | --- |{' --- |' * len(ranges)}")
    for side in options.sides:
        cells = " | ".join(map(str, seen[side]))
        kilobytes = sizes[side] / len(places) / 1e3
        print(f"| {side} | {kilobytes:.0f} | {sizes[side] / whole:.0%} | {cells} |")
