"""A picture of the views for the eye: ours beside the reference, sample by sample.

Each row shows a stored image, its two views as training gets them, the same draws carried out by
Pillow and torchvision, and what the usual pipeline draws by itself.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

from mocov3_ds.data.fetch import read_sample
from mocov3_ds.data.manifest import Manifest, load
from mocov3_ds.data.views import decode, reference
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec

COLUMNS = (
    "stored",
    "ours, view 1",
    "same draws, Pillow",
    "ours, view 2",
    "same draws, Pillow",
    "usual view 1",
    "usual view 2",
)
_GAP, _TITLE = 4, 18  # pixels

Images = Sequence[Image.Image]


def draw_contact_sheet(
    url: str,
    out: Path,
    *,
    rows: int,
    size: int,
    seed: int,
    epoch: int,
    spec: ViewSpec | None = None,
) -> int:
    """Draw the sheet and write it as a PNG.

    Args:
        url: Folder or address of a sharded set.
        out: PNG file to write; its folder is made.
        rows: Number of samples shown, spread evenly over the set.
        size: Side of a view in pixels.
        seed: Seed of the run.
        epoch: Number of the pass over the data.
        spec: Distribution of the views; None = the default one.

    Returns:
        Largest difference between our views and the same draws by Pillow, of 255.

    Raises:
        ValueError: There is nothing to show, or a sample cannot be read.
    """
    manifest, spec = load(url), spec or ViewSpec()
    if rows < 1 or manifest.samples < 1:
        raise ValueError(f"{rows} rows of {manifest.samples} samples are nothing to show.")
    random.seed(seed)
    torch.manual_seed(seed)
    usual = [reference.view_transform(spec, v, size, normalised=False) for v in (0, 1)]
    sample_ids = np.linspace(0, manifest.samples - 1, rows).astype(int).tolist()
    pictures, largest = [], 0
    for sample_id in sample_ids:
        image_bytes, image = _read_image(manifest, sample_id)
        sample = (seed, epoch, sample_id)
        trained, by_pillow = _make_views(image_bytes, image, spec, size, sample)
        largest = max(largest, _largest_difference(trained, by_pillow))
        thumbnail = image.copy()
        thumbnail.thumbnail((size, size))
        compared = (trained[0], by_pillow[0], trained[1], by_pillow[1])
        pictures.append((thumbnail, *compared, *(transform(image) for transform in usual)))
    out.parent.mkdir(parents=True, exist_ok=True)
    _arrange(pictures, size).save(out, "PNG")
    return largest


def _arrange(pictures: Sequence[Images], size: int) -> Image.Image:
    """Rows of pictures below the titles of their columns."""
    tile = size + _GAP
    sheet = Image.new("RGB", (tile * len(COLUMNS), _TITLE + tile * len(pictures)), "white")
    for column, title in enumerate(COLUMNS):
        ImageDraw.Draw(sheet).text((column * tile + 2, 2), title, fill="black")
        for row, images in enumerate(pictures):
            sheet.paste(images[column], (column * tile, _TITLE + row * tile))
    return sheet


def _read_image(manifest: Manifest, sample_id: int) -> tuple[bytes, Image.Image]:
    """Stored bytes of a sample and its image in RGB."""
    image_bytes = read_sample(manifest, sample_id)
    if not isinstance(image_bytes, bytes):
        raise ValueError(f"sample {sample_id} cannot be read: {image_bytes.reason}")
    try:
        return image_bytes, decode.decode_rgb(image_bytes)
    except decode.UnreadableImage as error:
        raise ValueError(f"sample {sample_id} cannot be read: {error}") from None


def _make_views(
    image_bytes: bytes, image: Image.Image, spec: ViewSpec, size: int, sample: tuple[int, int, int]
) -> tuple[Images, Images]:
    """The two views as training gets them before the normalisation, and the same by Pillow."""
    crops_VCHW = np.empty((2, 3, size, size), np.uint8)
    params_VP = np.empty((2, PARAMETERS), np.float32)
    make_crops(image_bytes, spec, *sample, crops_VCHW, params_VP, augment=True)
    trained = [Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))) for x in crops_VCHW]
    boxes, flips, params_VP = draw_views(spec, *sample, image.height, image.width)
    draws = zip(boxes, flips, params_VP.tolist(), strict=True)
    return trained, [reference.make_drawn_view(image, *drawn, size) for drawn in draws]


def _largest_difference(trained: Images, by_pillow: Images) -> int:
    """Largest difference of a pixel between the images of two lists, of 255."""
    pairs = zip(trained, by_pillow, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) for a, b in pairs)


def show_views(
    shards: Annotated[str, tyro.conf.Positional],
    /,
    *,
    out: Path = Path("views.png"),
    rows: int = 8,
    size: int = 224,
    seed: int = 0,
    epoch: int = 0,
) -> None:
    """Draw a sheet of views as training sees them, beside the same draws by Pillow.

    Args:
        shards: folder or URL of a sharded set.
        out: PNG file to write.
        rows: number of samples that are shown.
        size: side of a view, pixels.
        seed: seed of the run, which decides the views.
        epoch: number of the pass over the data, from 0.
    """
    largest = draw_contact_sheet(shards, out, rows=rows, size=size, seed=seed, epoch=epoch)
    print(  # noqa: T201
        f"{out}: ours differs from the same draws by Pillow by at most {largest} of 255"
    )
