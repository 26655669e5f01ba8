"""A picture of the views for the eye: ours beside the reference, sample by sample.

Each row shows a stored image, its two views as training gets them, the same draws carried out by
Pillow and torchvision, and what the usual pipeline draws by itself.
"""

import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mocov3_ds.data.fetch import fetch_one
from mocov3_ds.data.manifest import load
from mocov3_ds.data.views import decode, photometric, reference
from mocov3_ds.data.views.pairs import make_pair
from mocov3_ds.data.views.photometric import ViewSpec

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


def contact_sheet(
    url: str,
    out: Path,
    *,
    rows: int,
    size: int,
    seed: int,
    epoch: int,
    spec: ViewSpec | None = None,
) -> int:
    """Write the sheet.

    Args:
        url: folder of a sharded set.
        out: PNG file.
        rows: samples shown, spread evenly over the set.
        size: side of a view, pixels.
        seed: of the run.
        epoch: pass over the data.
        spec: distribution of the views; None = the default one.

    Returns:
        Largest difference between ours and the same draws in Pillow, of 255.

    Raises:
        ValueError: there is nothing to show, or no set.
    """
    manifest, spec = load(url), spec or ViewSpec()
    if rows < 1 or manifest.samples < 1:
        raise ValueError(f"{rows} rows of {manifest.samples} samples are nothing to show.")
    tile = size + _GAP
    sheet = Image.new("RGB", (tile * len(COLUMNS), _TITLE + tile * rows), "white")
    for column, title in enumerate(COLUMNS):
        ImageDraw.Draw(sheet).text((column * tile + 2, 2), title, fill="black")
    random.seed(seed)
    torch.manual_seed(seed)
    usual = [reference.view_transform(spec, v, size, normalised=False) for v in (0, 1)]
    largest = 0
    for row, sample in enumerate(np.linspace(0, manifest.samples - 1, rows).astype(int).tolist()):
        data = fetch_one(manifest, sample)
        if not isinstance(data, bytes):
            raise ValueError(f"sample {sample} cannot be read: {data.reason}")
        try:
            image = decode.rgb(data)
        except decode.UnreadableImage as error:
            raise ValueError(f"sample {sample} cannot be read: {error}") from None
        ours = _ours(data, spec, size, (seed, epoch, sample))
        boxes, flips, params = photometric.draw(
            spec, seed, epoch, sample, image.height, image.width
        )
        same = [
            reference.drawn_view(image, box, flip, params_P, size)
            for box, flip, params_P in zip(boxes, flips, params.tolist(), strict=True)
        ]
        for mine, theirs in zip(ours, same, strict=True):
            gap = np.abs(np.asarray(mine).astype(int) - np.asarray(theirs))
            largest = max(largest, int(gap.max()))
        whole = image.copy()
        whole.thumbnail((size, size))
        drawn = [view(image) for view in usual]
        tiles: Sequence[Image.Image] = (whole, ours[0], same[0], ours[1], same[1], *drawn)
        for column, picture in enumerate(tiles):
            sheet.paste(picture, (column * tile, _TITLE + row * tile))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(buffer.getvalue())
    return largest


def _ours(
    data: bytes, spec: ViewSpec, size: int, key: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """The two views of a sample as training gets them, before the normalisation."""
    crops_VCHW = np.empty((2, 3, size, size), np.uint8)
    params_VP = np.empty((2, photometric.PARAMETERS), np.float32)
    make_pair(data, spec, *key, crops_VCHW, params_VP, augment=True)
    first, second = (
        Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))) for x in crops_VCHW
    )
    return first, second
