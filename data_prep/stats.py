"""How are the classes and the sizes of a set spread? From its manifest alone, with a picture.

Shape suffixes: N = samples, C = classes, B = bins.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_prep.verify import class_name
from mocov3_ds.data import manifest, storage

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_BINS = 60


@dataclass(frozen=True, eq=False)
class Stats:
    """A set in numbers."""

    url: str
    shards: int
    bytes: int
    """bytes of all shards"""
    classes: dict[str, int]
    """samples by class name (or number), every class that is named, even an empty one"""
    unlabelled: int
    size_N: NDArray[np.int64]
    """bytes of each image"""
    short_N: NDArray[np.int64]
    """shorter side of each image, pixels; images of unknown size are left out"""
    long_N: NDArray[np.int64]

    def as_json(self) -> dict[str, Any]:
        """The numbers for machines: counts, and quantiles 0, 10, 50, 90, 100 % of the sizes."""
        return {
            "url": self.url,
            "shards": self.shards,
            "samples": len(self.size_N),
            "bytes": self.bytes,
            "unlabelled": self.unlabelled,
            "classes": self.classes,
            "image_bytes": _quantiles(self.size_N),
            "shorter_side": _quantiles(self.short_N),
            "longer_side": _quantiles(self.long_N),
        }

    def __str__(self) -> str:
        count = max(len(self.size_N), 1)
        lines = [
            f"{storage.hide_secrets(self.url)}: {len(self.size_N)} samples in {self.shards} "
            f"shards, {self.bytes / 1e6:.1f} MB ({self.size_N.sum() / count / 1e3:.1f} kB an image)"
        ]
        if self.classes:
            by_count = sorted(self.classes.items(), key=lambda item: item[1])
            lines.append(
                f"{len(by_count)} classes: {by_count[0][1]} ({by_count[0][0]}) to "
                f"{by_count[-1][1]} ({by_count[-1][0]}) samples each"
            )
        if self.unlabelled:
            lines.append(f"{self.unlabelled} samples have no label")
        lines.append(f"{'':22}{'least':>10}{'10 %':>10}{'median':>10}{'90 %':>10}{'most':>10}")
        for title, values_N in (
            ("image, bytes", self.size_N),
            ("shorter side, pixels", self.short_N),
            ("longer side, pixels", self.long_N),
        ):
            if len(values_N):
                row = "".join(f"{value:>10}" for value in _quantiles(values_N))
                lines.append(f"{title:22}{row}")
        return "\n".join(lines)


def set_stats(url: str) -> Stats:
    """Read a set's manifest and count.

    Raises:
        ValueError: There is no manifest, or it is damaged.
    """
    shards = manifest.load(url)
    label_N = shards.index_N["label"]
    labels, counts = np.unique(label_N[label_N >= 0], return_counts=True)
    classes = dict.fromkeys(shards.classes, 0)
    for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
        classes[class_name(shards, label)] = count
    sides_N2 = np.stack([shards.index_N["height"], shards.index_N["width"]], 1).astype(np.int64)
    known_N2 = sides_N2[(sides_N2 > 0).all(1)]
    return Stats(
        url=shards.url,
        shards=len(shards.shards),
        bytes=shards.bytes,
        classes=classes,
        unlabelled=int((label_N < 0).sum()),
        size_N=shards.index_N["size"].astype(np.int64),
        short_N=known_N2.min(1, initial=1 << 62),
        long_N=known_N2.max(1, initial=0),
    )


def _quantiles(values_N: NDArray[np.int64]) -> list[int]:
    return [int(v) for v in np.quantile(values_N, _QUANTILES)] if len(values_N) else []


def draw_histograms(stats: Stats, path: Path) -> None:
    """Draw three histograms to a PNG file: samples a class, bytes and shorter side of the images.

    Raises:
        OSError: The file cannot be written.
    """
    counts_C = np.array(sorted(stats.classes.values(), reverse=True) or [0])
    panels = [
        (f"samples of each of {len(counts_C)} classes, sorted", _bar_levels(counts_C), "", ""),
        _size_panel("images by size, kB", stats.size_N / 1e3),
        _size_panel("images by shorter side, pixels", stats.short_N),
    ]
    width, height, edge = 480, 240, 40
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (title, level_B, first, last) in enumerate(panels):
        x0, y0 = number * width + edge, height - edge
        across, up = width - 2 * edge, height - 2 * edge
        top = max(float(level_B.max(initial=0)), 1.0)
        bar = across / max(len(level_B), 1)
        for index, level in enumerate(level_B):
            x = x0 + index * bar
            pen.rectangle((x, y0 - up * level / top, x + bar - (bar > 3), y0), fill=(70, 110, 160))
        pen.line((x0, y0, x0 + across, y0), fill="black")
        pen.text((x0, 8), title, fill="black", font=font)
        pen.text((x0, y0 + 6), first, fill="black", font=font)
        pen.text((x0 + across, y0 + 6), last, fill="black", font=font, anchor="ra")
        pen.text((x0 - 4, y0 - up), f"{top:.0f}", fill="black", font=font, anchor="ra")
    sheet.save(path, "PNG")


def _bar_levels(counts_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Heights of at most 400 bars (B,): each is the mean of neighbours."""
    groups = np.array_split(counts_C, min(len(counts_C), 400))
    return np.array([group.mean() for group in groups])


def _size_panel(title: str, values_N: NDArray[Any]) -> tuple[str, NDArray[np.float64], str, str]:
    """Title, heights of the bars (B,), and the words at both ends of the axis."""
    if not len(values_N):
        return f"{title}: not known", np.zeros(1), "", ""
    counts_B, edges = np.histogram(values_N, bins=_BINS)
    return title, counts_B.astype(np.float64), f"{edges[0]:.0f}", f"{edges[-1]:.0f}"
