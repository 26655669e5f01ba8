"""Which images lie in a folder that nobody has sharded, and what are their crops and classes?

Shape suffixes: B = rank batch, C H W = image.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.sample_order import spread_ids
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.decode import Sides, UnreadableImage

_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
}


class ImageFolder:
    """The images below a folder in the order of their paths; class folders give the labels.

    Links to folders are not followed, and names that begin with a dot are passed over. Where each
    image lies in a folder of its own below the root, the names of these are the classes, sorted.

    Args:
        root: folder to look through.

    Raises:
        ValueError: no image lies in it.
        OSError: a folder in it cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = 0
        """files that are no images by their names"""
        paths: list[str] = []
        for folder, inner, names in os.walk(root, onerror=_raise_error):
            inner[:] = sorted(name for name in inner if not name.startswith((".", "__MACOSX")))
            for name in names:
                if name.startswith(".") or Path(name).suffix.lower() not in _SUFFIXES:
                    self.left_out += 1
                else:
                    paths.append((Path(folder) / name).relative_to(root).as_posix())
        if not paths:
            raise ValueError(
                f"{root} holds neither shards (manifest.json) nor images ({self.left_out} other "
                "files)."
            )
        self.paths = sorted(paths)
        tops = [path.split("/")[0] if "/" in path else "" for path in self.paths]
        self.classes = [] if "" in tops else sorted({*tops})
        """names of the class folders; empty = the images have no labels"""
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels_N: NDArray[np.int64] = np.array([numbers.get(top, -1) for top in tops])

    def read_batches(
        self,
        *,
        image_size: int | Sides,
        channels: int = 3,
        batch: int,
        rank: int,
        world_size: int,
        threads: int,
        max_unreadable: int,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield centre crops of this rank's images, as `data.evaluation_batches` does for shards.

        Args:
            image_size: side of a crop, or its height and width, pixels; the image is resized until
                it covers 256/224 of them before.
            channels: channels of a crop.
            batch: most images of a batch.
            rank: number of this rank.
            world_size: number of ranks that share the images.
            threads: number of decoding threads; 0 = the caller decodes.
            max_unreadable: images of this rank that may be left out because they are unreadable.

        Yields:
            crops_BCHW uint8, labels_B int64 and the images' numbers ids_B int64.

        Raises:
            ValueError: more unreadable images than that; the last one is named.
        """
        unreadable = 0
        make_crop = partial(self._make_crop, image_size, channels)
        with ThreadPoolExecutor(max(threads, 1)) as decoders:
            run = decoders.map if threads else map
            for ids_B in spread_ids(len(self.paths), None, rank, world_size, batch):
                crops = list(run(make_crop, ids_B.tolist()))
                reasons = [crop for crop in crops if isinstance(crop, str)]
                unreadable += len(reasons)
                if unreadable > max_unreadable:
                    raise ValueError(
                        f"{unreadable} unreadable images, more than --max_unreadable "
                        f"{max_unreadable}; the last one is {reasons[-1]}."
                    )
                kept_B = np.array([not isinstance(crop, str) for crop in crops])
                if kept_B.any():
                    pixels = np.stack([crop for crop in crops if not isinstance(crop, str)])
                    yield (
                        torch.from_numpy(pixels),
                        torch.from_numpy(self.labels_N[ids_B[kept_B]]),
                        torch.from_numpy(ids_B[kept_B]),
                    )

    def _make_crop(
        self, image_size: int | Sides, channels: int, number: int
    ) -> NDArray[np.uint8] | str:
        """The centre crop (C, H, W) of an image, or its name and why it has none."""
        path = self.root / self.paths[number]
        try:
            image_bytes = path.read_bytes()
            return decode.centre_crop(image_bytes, image_size, channels=channels)
        except (UnreadableImage, OSError) as error:
            return f"{self.paths[number]!r} ({error})"


def _raise_error(error: OSError) -> None:
    raise error
