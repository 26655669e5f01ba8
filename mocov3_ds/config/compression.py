"""Sequence compression: how much of an image a step sees, by the run's progress (arXiv 2410.22364).

A schedule is a line of points PROGRESS:VALUES, such as "0:q0.25,k0.5,p2 0.6:0.5,p1 0.9:1". Progress
is the share of the run that is done. VALUES are the share of patch tokens that queries (`q`) and
keys (`k`) keep, a plain number for both, and the patch scale (`p`): how many times as long the side
of a patch is. What a point does not name stays as at the point before. Shares go in straight lines
from point to point; the patch scale holds until a point gives another. Two points of the same
progress are a jump.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import prod

from mocov3_ds.model.shapes import LARGEST_SCALE, scaled_grid, snap_scale, write_size
from mocov3_ds.settings.spelling import did_you_mean

OFF = "off"
READY = {
    OFF: "0:1",
    "2x": "0:0.25 0.5:0.25 0.9:1",
    "4x": "0:0.125 0.8:0.125 0.92:1",
}
"""schedules by name; what they save is in the README's table"""

LEVELS = 16
"""shares are rounded to multiples of 1 / LEVELS, so that few lengths occur in a run"""
_LATEST_FULL = 0.95
"""progress from which on the sequences are whole, at the latest"""
_POINTS = 1000
"""steps at which the length of a whole run is looked at"""


@dataclass(frozen=True, kw_only=True)
class SequenceLength:
    """How much of an image a step sees."""

    query_share: float = 1.0
    """share of the patch tokens that the base encoder gets"""
    key_share: float = 1.0
    """share of the patch tokens that the momentum encoder gets"""
    patch_scale: float = 1.0
    """side of a patch over that of a whole sequence"""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self == SequenceLength()


@dataclass(frozen=True, kw_only=True)
class Point:
    """A corner of a schedule."""

    progress: float
    """share of the run that is done, from 0 to 1"""
    length: SequenceLength = SequenceLength()


@lru_cache
def read_schedule(text: str) -> tuple[Point, ...]:
    """Points of a schedule that is named or written out.

    Args:
        text: value of `--compress`, a name in `READY` or points.

    Raises:
        ValueError: it is neither, its progress goes backwards, it does not end at full length, or
            it is of full length all along.
    """
    points: list[Point] = []
    for entry in READY.get(text, text).split():
        earlier_point = points[-1] if points else Point(progress=-1.0)
        points.append(_read_point(text, entry, earlier_point))
    if not points or points[0].progress > 0:
        raise ValueError(
            f"--compress {text!r} says nothing of the run's start: begin with 0:SHARE."
        )
    last = points[-1]
    if not last.length.is_whole or last.progress > _LATEST_FULL:
        raise ValueError(
            f"--compress {text!r} does not end at full length: its last point must have all tokens "
            f"and the patch scale 1 at a progress of {_LATEST_FULL} or before, e.g. 0.9:1,p1."
        )
    if text != OFF and all(length.is_whole for length in _corners(tuple(points))):
        raise ValueError(
            f"--compress {text!r} has no effect: no step has fewer patches, shares being rounded "
            f"to multiples of 1/{LEVELS}; leave it out."
        )
    return tuple(points)


def _corners(points: tuple[Point, ...]) -> Iterator[SequenceLength]:
    """Lengths at both ends of each part of a schedule that lasts; those between are no shorter."""
    for start, end in pairwise(points):
        if end.progress > start.progress:
            for corner in (start, end):
                yield SequenceLength(
                    query_share=_round_share(corner.length.query_share),
                    key_share=_round_share(corner.length.key_share),
                    patch_scale=start.length.patch_scale,
                )


def _round_share(share: float) -> float:
    return max(round(share * LEVELS), 1) / LEVELS


def _read_point(text: str, entry: str, before: Point) -> Point:
    """A point as written, with what it leaves out from the point before."""
    progress_text, colon, values = entry.partition(":")
    if not colon:
        raise ValueError(
            f"--compress {text!r} is no schedule{did_you_mean(text, READY)}; there are "
            f"{', '.join(READY)}, and schedules of your own, e.g. '0:0.25 0.5:0.25 0.9:1'."
        )
    progress = _read_number(text, progress_text, 0.0, 1.0)
    if progress < before.progress:
        raise ValueError(
            f"--compress {text!r} goes back from the progress {before.progress:g} to {progress:g}; "
            "write the points in the order of the run."
        )
    length = before.length
    kinds: set[str] = set()
    for value in values.split(","):
        kind = value[:1] if value[:1] in ("q", "k", "p") else ""
        if kind in kinds or (not kind and kinds & {"q", "k"}):
            raise ValueError(
                f"--compress {text!r} says twice how much is kept or how large patches are: "
                f"{entry!r}; a share for both comes first, and each of q, k and p once."
            )
        kinds.add(kind)
        if kind == "p":
            scale = _read_number(text, value[1:], 1.0, LARGEST_SCALE)
            length = replace(length, patch_scale=scale)
            continue
        share = _read_number(text, value.removeprefix(kind), 0.5 / LEVELS, 1.0)
        if kind != "k":
            length = replace(length, query_share=share)
        if kind != "q":
            length = replace(length, key_share=share)
    return Point(progress=progress, length=length)


def _read_number(text: str, written: str, low: float, high: float) -> float:
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"--compress {text!r}: {written!r} is no number from {low:g} to {high:g}; a point is "
            "PROGRESS:SHARE or PROGRESS:qSHARE,kSHARE,pSCALE."
        )
    return number


def length_at(points: tuple[Point, ...], progress: float) -> SequenceLength:
    """Shares, rounded to a level, and patch scale at a progress of the run.

    Args:
        points: the schedule, see `read_schedule`.
        progress: share of the run that is done, from 0 to 1.
    """
    index = max(i for i, point in enumerate(points) if point.progress <= progress)
    start_point, end_point = points[index], points[min(index + 1, len(points) - 1)]
    way = end_point.progress - start_point.progress
    fraction = (progress - start_point.progress) / way if way else 0.0

    def share(start: float, end: float) -> float:
        return _round_share(start + fraction * (end - start))

    return SequenceLength(
        query_share=share(start_point.length.query_share, end_point.length.query_share),
        key_share=share(start_point.length.key_share, end_point.length.key_share),
        patch_scale=start_point.length.patch_scale,
    )


@dataclass(frozen=True, kw_only=True)
class StepLength:
    """Patches of an image that take part in a step."""

    patches: int
    """patches that an image has at the step's patch scale"""
    query_patches: int
    """of them, those that the base encoder gets"""
    key_patches: int
    """of them, those that the momentum encoder gets"""
    patch_scale: float
    """side of a patch over that of a whole sequence"""

    def share_of(self, whole: int) -> float:
        """Memory of a pass over that of one over a whole sequence of so many patches.

        Keys take a fraction of what queries take, as nothing of them is kept for a backward.
        """
        return min((max(self.query_patches, self.key_patches / 4) + 1) / (whole + 1), 1.0)

    def as_values(self) -> dict[str, float]:
        """The columns of the log that name the step's phase."""
        return {
            "query_patches": self.query_patches,
            "key_patches": self.key_patches,
            "patch_scale": self.patch_scale,
        }


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The patches that a network makes of an image."""

    network: str
    """name of the network, for messages"""
    image_size: tuple[int, int]
    """height and width of an image, pixels"""
    count: int
    """patches of an image, of which a pass may leave some out; 0 = it cannot"""
    side: int
    """side of a patch, pixels, where a pass may use larger ones; 0 = it cannot"""

    def count_at(self, scale: float) -> int:
        """Patches of an image whose patches have sides so many times as long.

        Raises:
            ValueError: such patches do not divide the image.
        """
        return prod(scaled_grid(self.image_size, self.side, scale)) if scale != 1 else self.count

    def length_of(self, length: SequenceLength) -> StepLength:
        """Patches that take part in a step of this length, the scale that of whole pixels.

        Raises:
            ValueError: larger patches do not divide the image.
        """
        scale = snap_scale(self.side, length.patch_scale) if self.side else length.patch_scale
        return count_length(replace(length, patch_scale=scale), self.count_at(scale))


def check_patches(text: str, patches: Patches) -> None:
    """Refuse to compress the sequences of a network that cannot do it.

    Args:
        text: value of `--compress`, a name in `READY` or points.
        patches: what is known of the network.

    Raises:
        ValueError: it has no patches to leave out, cannot have larger ones as the schedule asks, or
            so few that none is left out.
    """
    points = read_schedule(text)
    if text == OFF:
        return
    if not patches.count:
        raise ValueError(
            f"--compress {text} leaves patches of an image out, and {patches.network} has none "
            "that can be left out: it is for Vision Transformers (vit, vit_conv, timm:vit_*)."
        )
    for scale in {point.length.patch_scale for point in points} - {1.0}:
        if not patches.side:
            raise ValueError(
                f"--compress {text}: {patches.network} cannot have patches {scale:g} times as "
                "large, as no single projection makes its tokens; leave the patch scale out."
            )
        if any(side % patches.side for side in patches.image_size):
            raise ValueError(
                f"--compress {text}: the patches of {patches.network}, of {patches.side} pixels, "
                f"do not divide an image of {write_size(patches.image_size)}, so there can be no "
                "larger ones; choose --views.image_size that they divide, or leave the patch scale "
                "out."
            )
        patches.count_at(scale)
    if all(_is_whole(patches.length_of(length)) for length in _corners(points)):
        raise ValueError(
            f"--compress {text} has no effect on {patches.network}: of its {patches.count} patches "
            "none would be left out; leave it out."
        )


def _is_whole(length: StepLength) -> bool:
    counts = {length.patches, length.query_patches, length.key_patches}
    return len(counts) == 1 and length.patch_scale == 1


def check_last_step(text: str, total_steps: int) -> None:
    """Refuse a run so short that its last step would not be at full length.

    Args:
        text: value of `--compress`, a name in `READY` or points.
        total_steps: steps of the schedule.

    Raises:
        ValueError: it is.
    """
    points = read_schedule(text)
    if total_steps > 0 and not length_at(points, (total_steps - 1) / total_steps).is_whole:
        raise ValueError(
            f"--compress {text} does not come to full length in the {total_steps} steps of this "
            "run; train longer, or give a schedule that ends sooner."
        )


def step_length(text: str, progress: float, patches: Patches) -> StepLength | None:
    """Patches that take part in a step; None where the schedule leaves none out at any time.

    Args:
        text: value of `--compress`, a name in `READY` or points.
        progress: share of the schedule's steps that are done before it.
        patches: those of the network, see `check_patches`.
    """
    if text == OFF:
        return None
    return patches.length_of(length_at(read_schedule(text), progress))


def count_lengths(text: str, patches: Patches) -> dict[StepLength, float]:
    """Lengths that occur in a run, in the order of the run, and the share of its steps with each.

    Args:
        text: value of `--compress`, not `off`.
        patches: those of the network, see `check_patches`.
    """
    middles = ((index + 0.5) / _POINTS for index in range(_POINTS))
    lengths = Counter(step_length(text, middle, patches) for middle in middles)
    return {length: count / _POINTS for length, count in lengths.items() if length is not None}


def count_length(length: SequenceLength, patches: int) -> StepLength:
    """Patches of a step, at least one.

    Args:
        length: shares and patch scale.
        patches: patches that an image has at that scale.
    """
    return StepLength(
        patches=patches,
        query_patches=max(round(length.query_share * patches), 1),
        key_patches=max(round(length.key_share * patches), 1),
        patch_scale=length.patch_scale,
    )
