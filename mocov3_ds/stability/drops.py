"""Where does a k-NN curve fall by more than its noise? A scan over all places and widths.

At each place the mean of the evaluations before is compared with the mean of those after, for
widths from two evaluations to a third of the curve, in standard errors that the curve's own noise
gives; where it is larger than in the rest of the curve, the noise around counts. A healthy curve
rises, so a flat one is the worst that a quiet run can be: the threshold is set by simulating flat
curves (`calibrate`) with Gaussian noise, heavy tails and memories, such that one in fifty of any
kind has a drop anywhere, and of runs that rise fewer. Narrow widths have more places to be wrong
in; the term sqrt(2 ln(K / width)) allows for that. Single evaluations count for no more than is as
seldom in Gaussian noise (`curve_tails`), and narrow drops of a heavy-tailed curve for nothing where
bumps are as high: such noise goes as far up as down.

Shape suffixes: K = k-NN evaluations, W = widths.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mocov3_ds.stability.curve_tails import FEWEST_FOR_TAILS, as_gaussian
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.knn_noise import Noise, local_scale

TABLE = Path(__file__).parent / "drop_thresholds.json"
"""thresholds by number of evaluations, made by `python -m mocov3_ds.bench verdicts --calibrate`"""
FEWEST = 8
"""evaluations below which no drop can be told from noise"""
MOST_BEFORE = 8
"""evaluations before a narrow drop that tell its level"""
CLIP = 4.0
"""deviations from its neighbours' median beyond which one evaluation counts no more"""
SINGLE_DEVIATIONS, SINGLE_SHARE = 6.0, 0.15
"""a drop of one evaluation: so many deviations, and such a share of the level"""
OVER_HIGHEST, OVER_HIGHEST_COUNT = (4.0, 6.0), 40
"""and so many times as far down as the highest one is up: from 4 to 6, the number of evaluations
over 40. With tails of a Student's t with 3 degrees, c times happens in 1 / (1 + c^3) of the curves;
a long curve also has more places for it, and less for a dip that heals between two evaluations"""
LIGHT, LIGHT_DEVIATIONS, LIGHT_SHARE, LIGHT_OVER = 8.0, 8.0, 0.03, 5.0
"""the three where there are enough evaluations to tell that tails are no heavier than those of a
Student's t of so many degrees"""
OVER_HIGHEST_BUMP, HEAVY = 2.0, 8.0
"""a narrow drop is so many times as deep as the highest bump of its width is high, where tails are
as heavy as those of a t of so many degrees: between two dips of another curve is a bump, too"""
SIDE = 4
"""evaluations on each side of a single one that tell the level"""
BACK = 0.75
"""share of its depth that those after a single one have made good"""
_WIDER = 1.35


@dataclass(frozen=True)
class Drop:
    """A place where a curve falls.

    Attributes:
        at: index of the first evaluation after the fall.
        before: evaluations before it that tell the level.
        width: evaluations after it that are lower.
        depth: mean of those before minus mean of those after, points.
        above: how far its standard errors are above the threshold.
    """

    at: int
    before: int
    width: int
    depth: float
    above: float


def widths(count: int) -> list[int]:
    """Widths that are scanned in a curve of so many evaluations, ascending."""
    ascending, width = [], 2.0
    while width <= count / 3:
        ascending.append(round(width))
        width *= _WIDER
    return sorted({*ascending})


def evaluations_before(width: int, count: int) -> int:
    """Evaluations that tell the level before a drop of a width, in a curve of so many."""
    return max(width, min(MOST_BEFORE, count // 4))


def clip_singles(knn_K: Array, noise: Noise) -> Array:
    """The curve with each evaluation as far from the median of its five as noise takes it.

    That is `CLIP` deviations at most, and less where tails are heavy: no farther than Gaussian
    noise would be in a place as seldom.
    """
    if len(knn_K) < FEWEST:
        return knn_K
    padded = np.pad(knn_K, 2, mode="reflect")
    median_K = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    apart_K = as_gaussian(knn_K - median_K, noise.degrees)
    limit_K = CLIP * noise.deviation * local_scale(knn_K)
    clipped: Array = np.clip(apart_K, -limit_K, limit_K)
    return median_K + clipped


def scan(knn_K: Array, noise: Noise) -> list[tuple[int, int, Array, Array]]:
    """For each width: width, evaluations before, depths, and standard errors less the allowance.

    The arrays hold one value for each place, from the first with enough evaluations before it.
    """
    count = len(knn_K)
    sums = _sums(knn_K, noise)
    squares = np.concatenate([[0.0], np.cumsum(local_scale(knn_K) ** 2)])
    scanned = []
    for width in widths(count):
        before = evaluations_before(width, count)
        at = np.arange(before, count - width + 1)
        if len(at):
            level = (sums[at] - sums[at - before]) / before
            depths = level - (sums[at + width] - sums[at]) / width
            noisier = np.maximum(
                (squares[at] - squares[at - before]) / before,
                (squares[at + width] - squares[at]) / width,
            )
            errors = noise.of_step(before, width) * np.sqrt(noisier)
            allowance = math.sqrt(2 * math.log(count / width))
            scanned.append((width, before, depths, depths / errors - allowance))
    return scanned


def _sums(knn_K: Array, noise: Noise) -> Array:
    """Sums of the first 0, 1, ... evaluations, each as far out as noise takes it, (K + 1,)."""
    return np.concatenate([[0.0], np.cumsum(clip_singles(knn_K, noise))])


def highest_bump(knn_K: Array, noise: Noise, width: int) -> float:
    """How far the highest mean of a width is above those before and after it, in points.

    No dip makes such a bump, but between two; noise makes as high ones as it makes deep dips.
    """
    before = evaluations_before(width, len(knn_K))
    at = np.arange(before, len(knn_K) - width - before + 1)
    if len(at) == 0:
        return 0.0
    sums = _sums(knn_K, noise)
    sides = np.maximum(sums[at] - sums[at - before], sums[at + width + before] - sums[at + width])
    return max(float(np.max((sums[at + width] - sums[at]) / width - sides / before)), 0.0)


def largest_excess(knn_K: Array, noise: Noise) -> float:
    """The largest standard errors less allowance of a whole scan: what the threshold is set on."""
    return max((float(errors.max()) for *_, errors in scan(knn_K, noise)), default=-math.inf)


@cache
def _thresholds(name: str) -> tuple[Array, Array]:
    table = json.loads(TABLE.read_text())
    counts = np.array([float(count) for count in table])
    return counts, np.array([row[name] for row in table.values()], float)


def threshold(count: int, remembers: bool = True) -> float:
    """Standard errors less allowance above which a drop is none of noise.

    Args:
        count: evaluations of the curve.
        remembers: whether its noise does, of which less is known than of white noise.
    """
    counts, values = _thresholds("remembers" if remembers else "threshold")
    return float(np.interp(math.log(max(count, 1)), np.log(counts), values))


def smallest_drop(count: int, noise: Noise, width: int) -> float:
    """Points of a drop of a width that would just be told from noise."""
    allowance = math.sqrt(2 * math.log(max(count / width, 1.0)))
    error = noise.of_step(evaluations_before(width, count), width)
    return error * (threshold(count, noise.remembers) + allowance)


def smallest_dip(knn_K: Array, noise: Noise, width: int = 3) -> float:
    """Points of a dip of so many evaluations that would just be told, NaN in too short a curve.

    A dip is told against the evaluations before it, so it has to be deeper by what the curve rises
    from those to its own, at half of all places.
    """
    count = len(knn_K)
    level_count = evaluations_before(width, count)
    places = np.arange(level_count, count - width + 1)
    if count < FEWEST or not len(places):
        return math.nan
    sums = _sums(knn_K, noise)
    levels = (sums[places] - sums[places - level_count]) / level_count
    rises = (sums[places + width] - sums[places]) / width - levels
    return smallest_drop(count, noise, width) + max(float(np.median(rises)), 0.0)


def find_drops(knn_K: Array, noise: Noise, widest: int | None = None) -> list[Drop]:
    """Drops above the threshold, of all places and widths, the clearest first.

    Args:
        knn_K: accuracies in percent, (K,).
        noise: noise of the curve.
        widest: widths to look at; None = all.
    """
    if len(knn_K) < FEWEST:
        return []
    limit = threshold(len(knn_K), noise.remembers)
    drops = []
    for width, before, depths, errors in scan(knn_K, noise):
        if widest is not None and width > widest:
            continue
        found = np.flatnonzero(errors > limit)
        if len(found) and width <= MOST_BEFORE and noise.degrees < HEAVY:
            least = OVER_HIGHEST_BUMP * highest_bump(knn_K, noise, width)
            found = found[depths[found] > least]
        for index in found:
            excess = float(errors[index]) - limit
            drops.append(Drop(before + int(index), before, width, float(depths[index]), excess))
    return sorted(drops, key=lambda drop: -drop.above)


def find_single_drops(knn_K: Array, noise: Noise) -> list[Drop]:
    """Drops of one evaluation below all but one of the four before it, and of the four after.

    A place in a dip that takes its time to heal is none: those around it are low, too. Heavy tails
    are told by the other side: a noise that never goes far up goes never far down.
    """
    if len(knn_K) < FEWEST:
        return []
    sides = np.sort(np.lib.stride_tricks.sliding_window_view(knn_K, SIDE), axis=1)
    second_lowest, second_highest = sides[:, 1], sides[:, -2]
    without_one = np.full(SIDE, np.inf)  # evaluations near the ends have no four on a side
    before_K = np.concatenate([-without_one, second_lowest[: len(knn_K) - SIDE]])
    after_K = np.concatenate([second_lowest[1:], without_one])
    level_K = np.minimum(before_K, after_K)
    depth_K = level_K - knn_K
    higher_K = np.concatenate([second_highest[1:], -without_one])
    above_K = knn_K[SIDE:] - np.maximum(second_highest[: len(knn_K) - SIDE], higher_K[SIDE:])
    highest = max(float(np.max(above_K)), 0.0)
    deviations, share = SINGLE_DEVIATIONS, SINGLE_SHARE
    over = min(max(len(knn_K) / OVER_HIGHEST_COUNT, OVER_HIGHEST[0]), OVER_HIGHEST[1])
    if len(knn_K) >= FEWEST_FOR_TAILS and noise.degrees > LIGHT:
        deviations, share, over = LIGHT_DEVIATIONS, LIGHT_SHARE, min(over, LIGHT_OVER)
    far_K = deviations * noise.deviation * local_scale(knn_K)
    limit_K = np.maximum(np.maximum(far_K, over * highest), share * level_K)
    is_back = after_K - knn_K > BACK * (before_K - knn_K)
    return [
        Drop(int(index), SIDE, 1, float(depth_K[index]), 0.0)
        for index in np.flatnonzero((depth_K > limit_K) & is_back)
    ]
