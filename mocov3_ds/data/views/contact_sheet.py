"""A picture of the views for the eye: ours beside the reference, sample by sample.

Each row shows a stored image; its two views as training gets them, epoch by epoch, each beside the
same draw carried out by Pillow and torchvision; and what the usual pipeline draws by itself. Views
of a user's own functions have nothing to be compared with, and the usual pipeline knows RGB and
grey alone. Channels of other images stand beside one another, in grey (`layers.as_strip`).
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mocov3_ds.data.fetch import read_sample
from mocov3_ds.data.manifest import Manifest, load
from mocov3_ds.data.storage import atomic
from mocov3_ds.data.views import decode, layers, reference
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.decode import Sides
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.own_views import make_own_views
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec

_GAP, _TITLE = 4, 18  # pixels

Tile = tuple[str, NDArray[np.uint8]]
"""title of a column, and the pixels (C, H, W) that a row shows there"""


def draw_contact_sheet(
    url: str,
    out: Path,
    *,
    rows: int,
    size: Sides,
    seed: int,
    epochs: Sequence[int],
    spec: ViewSpec | None = None,
) -> int | None:
    """Draw the sheet and write it as a PNG.

    Args:
        url: Folder or address of a sharded set.
        out: PNG file to write; its folder is made.
        rows: Number of samples shown, spread evenly over the set.
        size: Height and width of a view in pixels.
        seed: Seed of the run.
        epochs: Numbers of the passes over the data whose views are shown.
        spec: Distribution of the views; None = the default one.

    Returns:
        Largest difference between our views and the same draws by Pillow, of 255; None where the
        views are those of a user's own functions.

    Raises:
        ValueError: There is nothing to show, a sample cannot be read, or a function fails.
    """
    manifest, spec = load(url), spec or ViewSpec()
    if rows < 1 or manifest.samples < 1 or not epochs:
        raise ValueError(
            f"{rows} rows of {manifest.samples} samples in {len(epochs)} epochs are nothing to "
            "show."
        )
    random.seed(seed)
    torch.manual_seed(seed)
    shown, largest = [], 0
    for sample_id in np.linspace(0, manifest.samples - 1, rows).astype(int).tolist():
        image_bytes, image_layers = _read_image(manifest, sample_id, spec.channels)
        tiles = [("stored", _thumbnail(image_layers, size))]
        for epoch in epochs:
            pairs = _make_views(image_bytes, image_layers, spec, size, (seed, epoch, sample_id))
            for view, (ours_CHW, by_pillow_CHW) in enumerate(pairs, 1):
                tiles.append((f"epoch {epoch}, view {view}", ours_CHW))
                if by_pillow_CHW is not None:
                    tiles.append(("same draws, Pillow", by_pillow_CHW))
                    largest = max(largest, int(np.abs(ours_CHW - by_pillow_CHW.astype(int)).max()))
        shown.append([*tiles, *_usual_views(image_layers, spec, size)])
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_when_whole(out) as path:
        _arrange(shown, size).save(path, "PNG")
    return largest if spec.functions is None else None


def _arrange(shown: Sequence[Sequence[Tile]], size: Sides) -> Image.Image:
    """Rows of tiles below the titles of their columns."""
    columns, channels = len(shown[0]), len(shown[0][0][1])
    tall = size[0] + _GAP
    wide = layers.strip_width(channels, size[1]) + _GAP
    sheet = Image.new("RGB", (wide * columns, _TITLE + tall * len(shown)), "white")
    for row, tiles in enumerate(shown):
        for column, (title, pixels_CHW) in enumerate(tiles):
            ImageDraw.Draw(sheet).text((column * wide + 2, 2), title, fill="black")
            sheet.paste(layers.as_strip(pixels_CHW), (column * wide, _TITLE + row * tall))
    return sheet


def _read_image(
    manifest: Manifest, sample_id: int, channels: int
) -> tuple[bytes, list[Image.Image]]:
    """Stored bytes of a sample and the layers of its image."""
    image_bytes = read_sample(manifest, sample_id)
    if not isinstance(image_bytes, bytes):
        raise ValueError(f"sample {sample_id} cannot be read: {image_bytes.reason}")
    try:
        return image_bytes, decode.decode_layers(image_bytes, channels)
    except decode.UnreadableImage as error:
        raise ValueError(f"sample {sample_id} cannot be read: {error}") from None


def _thumbnail(image_layers: Sequence[Image.Image], size: Sides) -> NDArray[np.uint8]:
    """The stored image, small enough for a tile."""
    copies = [layer.copy() for layer in image_layers]
    for copy in copies:
        copy.thumbnail(size[::-1])
    return layers.stack_layers(copies)


def _make_views(
    image_bytes: bytes,
    image_layers: Sequence[Image.Image],
    spec: ViewSpec,
    size: Sides,
    sample: tuple[int, int, int],
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """Each view as training gets it before the normalisation, and the same by Pillow."""
    if spec.functions is not None:
        views_VCHW = np.empty((2, spec.channels, *size), np.float32)
        make_own_views(image_bytes, spec, sample, views_VCHW)
        mean_C11, std_C11 = (np.array(v)[:, None, None] for v in (spec.mean, spec.std))
        pixels_VCHW = (views_VCHW * std_C11 + mean_C11).clip(0, 1) * 255
        yield from ((view_CHW, None) for view_CHW in pixels_VCHW.round().astype(np.uint8))
        return
    crops_VCHW = np.empty((2, spec.channels, *size), np.uint8)
    params_VP = np.empty((2, PARAMETERS), np.float32)
    make_crops(image_bytes, spec, *sample, crops_VCHW, params_VP, augment=True)
    height, width = image_layers[0].height, image_layers[0].width
    boxes, flips, params_VP = draw_views(spec, *sample, height, width)
    draws = zip(boxes, flips, params_VP.tolist(), strict=True)
    for ours_CHW, drawn in zip(crops_VCHW, draws, strict=True):
        by_pillow = (reference.make_drawn_view(layer, *drawn, size) for layer in image_layers)
        yield ours_CHW, layers.stack_layers(by_pillow)


def _usual_views(
    image_layers: Sequence[Image.Image], spec: ViewSpec, size: Sides
) -> Iterator[Tile]:
    """What the usual pipeline draws by itself, where it knows such images."""
    if spec.functions is None and len(image_layers) == 1:
        for view in (0, 1):
            transform = reference.view_transform(spec, view, size, normalised=False)
            yield f"usual view {view + 1}", layers.stack_layers([transform(image_layers[0])])
