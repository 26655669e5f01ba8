"""What are mean and deviation of the pixels of a set? The numbers for --views.mean and --views.std.

Each image counts the same, whatever its size, as training makes as many views of each. Pixels are
those that training decodes, at their full size. Sums are exact, so the result does not depend on
the order of reading or on the number of threads.

Shape suffixes: C = channels, L = levels of a pixel, H W = image, N = images that were read.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.progress import Progress
from mocov3_ds.data.fetch import Unreadable, read_samples
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.sample_order import spread_ids
from mocov3_ds.data.views import decode, layers

_BATCH = 64  # images that are held at once
_LEVELS_L = np.arange(256, dtype=np.int64)


@dataclass(frozen=True)
class PixelStats:
    """Mean and deviation of the pixels in [0, 1], for each channel."""

    images: int
    """images that were read"""
    samples: int
    """images of the set"""
    unreadable: int
    """images that were to be read and could not be"""
    example: str
    """why the first of those could not be read; empty = all could"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    error: float
    """standard error of the means, the largest of all channels; 0 where each image was read"""

    @property
    def flags(self) -> str:
        """What a training command takes."""
        mean, std = (" ".join(f"{x:.4f}" for x in numbers) for numbers in (self.mean, self.std))
        flags = f"--views.mean {mean} --views.std {std}"
        if len(self.mean) != 3:
            flags = f"--views.channels {len(self.mean)} --views.colour_ops off {flags}"
        return flags

    def as_json(self) -> dict[str, Any]:
        """The numbers for machines."""
        return {
            "images": self.images,
            "unreadable": self.unreadable,
            "mean": [*self.mean],
            "std": [*self.std],
            "mean_error": self.error,
            "flags": self.flags,
        }

    def __str__(self) -> str:
        sampled = f"{self.images} of {self.samples} images, spread evenly"
        lines = [
            f"pixels of all {self.images} images:"
            if self.images == self.samples
            else f"pixels of {sampled}, means to ± {self.error:.4f}:",
            f"  {self.flags}",
        ]
        if self.unreadable:
            lines.append(f"  {self.unreadable} images could not be read: {self.example}")
        if len(self.mean) == 3 and len({*self.mean}) == len({*self.std}) == 1:
            lines.append("  the channels are alike: grey images; --channels 1 prints their flags")
        if not min(self.std):
            lines.append("  a channel never changes: its deviation must be above 0 to train on")
        return "\n".join(lines)


def measure_pixels(
    shards: Manifest, *, images: int = 0, channels: int = 3, threads: int = 0, quiet: bool = False
) -> PixelStats:
    """Read images of a set, spread evenly over it, and sum their pixels.

    Args:
        shards: Manifest of the set.
        images: Number of images that are read at most; 0 = all.
        channels: Channels that the images are decoded to.
        threads: Number of decoding threads; 0 = one a core.
        quiet: Show no progress on standard error.

    Raises:
        ValueError: None of the images can be read.
        OSError: The store cannot be read.
    """
    means, squares, reasons = [], [], []
    chosen = min(images or shards.samples, shards.samples)
    with (
        ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
        Progress("stats", chosen, quiet=quiet) as progress,
    ):
        for batch in _read_batches(shards, chosen):
            for sums in pool.map(partial(_sum_pixels, channels), batch):
                if isinstance(sums, str):
                    reasons.append(sums)
                else:
                    means.append(sums[0])
                    squares.append(sums[1])
            sizes = (len(x) for x in batch if isinstance(x, bytes))
            progress.update(len(batch), sum(sizes))
    if not means:
        raise ValueError(
            f"none of {chosen} images of {shards.url} can be read in {channels} channels: "
            f"{reasons[0] if reasons else 'there are none'} (--channels)."
        )
    mean_NC, square_NC = np.array(means), np.array(squares)
    mean_C = [math.fsum(x_N) / len(means) for x_N in mean_NC.T.tolist()]
    square_C = [math.fsum(x_N) / len(means) for x_N in square_NC.T.tolist()]
    spread = float(mean_NC.std(0).max()) / math.sqrt(len(means))
    return PixelStats(
        images=len(means),
        samples=shards.samples,
        unreadable=len(reasons),
        example=reasons[0] if reasons else "",
        mean=tuple(mean / 255 for mean in mean_C),
        std=tuple(
            math.sqrt(max(square - mean**2, 0.0)) / 255
            for mean, square in zip(mean_C, square_C, strict=True)
        ),
        error=0.0 if len(means) == shards.samples else spread / 255,
    )


def _read_batches(shards: Manifest, images: int) -> Iterator[list[bytes | Unreadable]]:
    for ids_N in spread_ids(shards.samples, images, 0, 1, _BATCH):
        yield [sample for _, sample in read_samples(shards, ids_N)]


def _sum_pixels(
    channels: int, image_bytes: bytes | Unreadable
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | str:
    """Mean of the pixels and of their squares (C,), or why there are none."""
    if isinstance(image_bytes, Unreadable):
        return image_bytes.reason
    try:
        pixels_CHW = layers.stack_layers(decode.decode_layers(image_bytes, channels))
    except decode.UnreadableImage as error:
        return str(error)
    counts_CL = np.stack([np.bincount(x_HW.ravel(), minlength=256) for x_HW in pixels_CHW])
    pixels = pixels_CHW[0].size
    return counts_CL @ _LEVELS_L / pixels, counts_CL @ _LEVELS_L**2 / pixels
