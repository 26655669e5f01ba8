"""The threshold of drops, set by simulation: `python -m mocov3_ds.bench verdicts --calibrate`.

Flat curves of each length are drawn with noise of several kinds, each estimated and scanned as a
run's curve is. A length has two thresholds, which one curve in fifty of the worst kind exceeds:
that of white noise, and a higher one for curves whose noise seems to remember. Runs rise, and have
fewer alarms than flat curves. Kinds are those that real curves are between:
Gaussian; Student's t with 3 degrees; an autoregressive one of 0.5, 0.8 and 0.9; and half white,
half 0.9, as binomial noise of the probes on top of a queue is. A kind counts from
`CORRELATION_TIMES` times (1 + phi) / (1 - phi) evaluations on: in a shorter curve such a noise and
a real fall are the same picture, and evaluations that few are so far apart that a queue is a new
one each time.

Shape suffix: K = k-NN evaluations.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.signal import lfilter

from mocov3_ds.stability.drops import FEWEST, largest_excess
from mocov3_ds.stability.findings import Array, Flags
from mocov3_ds.stability.knn_noise import estimate_noise

COUNTS = (FEWEST, 12, 20, 40, 60, 150, 300, 624, 1560, 5000)
CURVES = 600
"""curves of each length and kind; three times so many below 200 evaluations, a third from 3,000"""
FALSE_ALARMS = 0.02
"""false alarms per quiet run of the kind of noise that has most"""

CORRELATION_TIMES = 30.0


def autoregressive(phi: float) -> Callable[[int, np.random.Generator], Array]:
    """Noise of standard deviation 1 with such a correlation from one value to the next."""

    def draw(count: int, random: np.random.Generator) -> Array:
        white = random.standard_normal(count + 200)
        noise: Array = lfilter([math.sqrt(1 - phi * phi)], [1, -phi], white)[200:]
        return noise

    return draw


KINDS: Mapping[str, tuple[float, Callable[[int, np.random.Generator], Array]]] = {
    "Gaussian": (0.0, lambda count, random: random.standard_normal(count)),
    "t3": (0.0, lambda count, random: random.standard_t(3, count) / math.sqrt(3)),
    "AR 0.5": (0.5, autoregressive(0.5)),
    "AR 0.8": (0.8, autoregressive(0.8)),
    "AR 0.9": (0.9, autoregressive(0.9)),
    "half AR 0.9": (
        0.9,
        lambda count, random: (
            math.sqrt(0.5) * (random.standard_normal(count) + autoregressive(0.9)(count, random))
        ),
    ),
}
"""name -> correlation from one value to the next, and how noise of the kind is drawn"""


def kinds_for(count: int) -> list[str]:
    """Kinds of noise that a curve of so many evaluations can be told from."""
    return [
        kind
        for kind, (phi, _) in KINDS.items()
        if phi == 0 or count >= CORRELATION_TIMES * (1 + phi) / (1 - phi)
    ]


def simulate(count: int, kind: str, curves: int, seed: int = 0) -> tuple[Array, Flags]:
    """Largest excess of some flat curves, (curves,), and whether their noise seems to remember."""
    random = np.random.default_rng([seed, count, [*KINDS].index(kind)])
    excesses, remembers = np.empty(curves), np.empty(curves, bool)
    for curve in range(curves):
        knn_K = 50 + KINDS[kind][1](count, random)
        noise = estimate_noise(knn_K)
        excesses[curve], remembers[curve] = largest_excess(knn_K, noise), noise.remembers
    return excesses, remembers


def calibrate_length(count: int, curves: int = CURVES) -> dict[str, float]:
    """Both thresholds of one length, and beside them the false alarms of each kind, percent."""
    number = 3 * curves if count < 200 else curves if count < 3000 else curves // 3
    simulated = {kind: simulate(count, kind, number) for kind in kinds_for(count)}
    white = [simulated[kind][0] for kind in simulated if KINDS[kind][0] == 0]
    limit = max(float(np.quantile(excesses, 1 - FALSE_ALARMS)) for excesses in white)
    slow = [simulated[kind] for kind in simulated if KINDS[kind][0] > 0]
    # noise that remembers, and seems white, has a third of its alarms
    for excesses, remembers in slow:
        seems_white = np.where(remembers, excesses.min(), excesses)
        limit = max(limit, float(np.quantile(seems_white, 1 - FALSE_ALARMS / 3)))
    higher = [limit] + [float(np.quantile(excesses, 1 - FALSE_ALARMS)) for excesses, _ in slow]
    limits = round(limit, 2), round(max(higher), 2)
    shares = {
        kind: round(100 * float(np.mean(excesses > np.where(remembers, limits[1], limits[0]))), 2)
        for kind, (excesses, remembers) in simulated.items()
    }
    return {"threshold": limits[0], "remembers": limits[1], **shares}
