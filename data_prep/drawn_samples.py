"""What does a first run train on? Drawn sample images, sharded on first use; no download.

Ten classes: five shapes, each filled with stripes or chequers in a pair of opposite hues. Half of
the filling has one hue and half the other, so the mean colour of an image hardly tells its
class. Place, size, angle, pattern width, light, contrast and background are drawn anew for
each image; they are what a trained encoder must learn to look through.

Shape suffixes: H W = image (`SIZE`), 3 = RGB.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images
from mocov3_ds.data import manifest, storage

SIZE = 40
"""Side of an image, pixels."""

SPLITS = {"train": 4096, "test": 1000}
"""Images of each split, drawn from random streams of their own."""

SHAPES = ("disc", "square", "triangle", "ring", "cross")
PATTERNS = ("striped", "chequered")
CLASSES = tuple(f"{pattern}_{shape}" for pattern in PATTERNS for shape in SHAPES)

Plane = NDArray[np.float32]


def ensure_samples(folder: Path, splits: Mapping[str, int] = SPLITS) -> tuple[str, str]:
    """Make shards of the sample images if they do not exist.

    Several processes may do this at once: each works in a temporary folder, the first to finish
    moves it into place, the others drop theirs.

    Args:
        folder: Folder of the splits, which may exist already.
        splits: Number of images of the training and the test split.

    Returns:
        URLs of the training and the test split.

    Raises:
        ValueError: The folder holds something else.
        OSError: The folder cannot be written.
    """
    train, test = (str(folder / split) for split in splits)
    if not _hold_shards(train, test):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            for stream, (split, count) in enumerate(splits.items()):
                images = Path(temporary) / "images" / split
                draw_split(images, stream, count)
                shards = str(Path(temporary) / "shards" / split)
                options = ShardOptions(shard_size="512", split=split)
                make_shards(list_images(str(images)), shards, options, workers=1, quiet=True)
            try:
                (Path(temporary) / "shards").rename(folder)
            except OSError:  # the folder exists: another process was first, or it is foreign
                if not _hold_shards(train, test):
                    raise ValueError(
                        f"{folder} is where the sample images go, and holds something else; "
                        "remove it, or choose another --runs."
                    ) from None
    return train, test


def _hold_shards(*urls: str) -> bool:
    return all(storage.exists(storage.join_url(url, manifest.NAME)) for url in urls)


def draw_split(folder: Path, stream: int, count: int) -> None:
    """Draw a class-folder tree of PNG files.

    Args:
        folder: Folder of the tree, which is made.
        stream: Number of the random stream; the same one gives the same images.
        count: Number of images, dealt to the classes in turn.
    """
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        label = number % len(CLASSES)
        image_HW3 = draw_image(label, np.random.default_rng([stream, number]))
        path = folder / CLASSES[label] / f"{number:05d}.png"
        Image.fromarray(image_HW3).save(path, compress_level=1)


_Y_HW, _X_HW = ((np.mgrid[0:SIZE, 0:SIZE] + 0.5) / SIZE * 2 - 1).astype(np.float32)


def draw_image(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image of a class.

    Args:
        label: Index of the class in `CLASSES`.
        rng: Random numbers for all that the class leaves open.

    Returns:
        The image, (SIZE, SIZE, 3) uint8.
    """
    pattern, shape = divmod(label, len(SHAPES))
    # background: a slope of light, faintly coloured
    slope_x, slope_y = rng.uniform(-0.25, 0.25, 2)
    light_HW = np.clip(rng.uniform(0.1, 0.9) + slope_x * _X_HW + slope_y * _Y_HW, 0, 1)
    back_HW3 = light_HW[..., None] * _hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.05), 1.0)
    # figure: the shape somewhere near the middle, filled with a pattern of two opposite hues
    across, down = rng.uniform(-0.3, 0.3, 2)
    radius = rng.uniform(0.7, 1.1)
    coverage_HW = _shape_coverage(
        SHAPES[shape],
        *_rotate((_X_HW - across) / radius, (_Y_HW - down) / radius, rng.uniform(-0.3, 0.3)),
        SIZE / 2 * radius,
    )
    waves = rng.uniform(5, 7)
    wave_x, wave_y = _rotate(_X_HW * waves, _Y_HW * waves, rng.uniform(0, np.pi))
    shift_x, shift_y = rng.uniform(0, 2 * np.pi, 2)
    waves_HW = np.sin(wave_x + shift_x)
    if PATTERNS[pattern] == "chequered":
        waves_HW = waves_HW * np.sin(wave_y + shift_y)
    hue = shape / 10 + rng.normal(0, 0.01)
    saturation, value = rng.uniform(0.4, 0.8), rng.uniform(0.5, 0.9)
    one_3, other_3 = (_hsv_to_rgb(hue + turn, saturation, value) for turn in (0.0, 0.5))
    fill_HW3 = np.where(waves_HW[..., None] > 0, one_3, other_3)
    image_HW3 = back_HW3 + coverage_HW[..., None] * (fill_HW3 - back_HW3)
    # the camera: contrast, exposure, noise
    image_HW3 = ((image_HW3 - 0.5) * rng.uniform(0.6, 1) + 0.5) * rng.uniform(0.6, 1)
    noisy_HW3 = image_HW3 * 255 + rng.normal(0, 5, image_HW3.shape)
    return noisy_HW3.clip(0, 255).astype(np.uint8)


def _rotate(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return cos * x + sin * y, cos * y - sin * x


def _shape_coverage(name: str, x: Plane, y: Plane, pixels: float) -> Plane:
    """How much of each pixel lies in a shape of radius 1; the edge is `1 / pixels` wide."""
    radius = np.hypot(x, y)
    if name == "disc":
        distance = radius - 1
    elif name == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.85
    elif name == "triangle":
        distance = np.maximum(abs(x) * 0.866 + y * 0.5, -y) - 0.55
    elif name == "ring":
        distance = abs(radius - 0.75) - 0.25
    else:
        bar = np.maximum(abs(x) - 1, abs(y) - 0.3)
        distance = np.minimum(bar, np.maximum(abs(y) - 1, abs(x) - 0.3))
    return np.clip(0.5 - distance * pixels, 0, 1)


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> NDArray[np.float64]:
    """Colour (3,) in [0, 1] of hue (1 = full turn), saturation and value."""
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
