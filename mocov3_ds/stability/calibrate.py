"""The threshold of drops, set by simulation: `python -m mocov3_ds.bench verdicts --calibrate`.

Flat curves of each length are drawn with noise of several kinds, each estimated and scanned as a
run's curve is. The threshold of a length is what one curve in a hundred exceeds, all kinds
together. Kinds are those that real curves are between:
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
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.knn_noise import estimate_noise
from mocov3_ds.stability.outliers import FALSE_ALARMS

COUNTS = (FEWEST, 12, 20, 40, 60, 150, 300, 624, 1560, 5000)
CURVES = 400
"""curves of each length and kind; a fifth of them from 3,000 evaluations on"""

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


def simulate(count: int, kind: str, curves: int, seed: int = 0) -> Array:
    """Largest excess of each of some flat curves, (curves,)."""
    random = np.random.default_rng([seed, count, [*KINDS].index(kind)])
    excesses = []
    for _ in range(curves):
        knn_K = 50 + KINDS[kind][1](count, random)
        excesses.append(largest_excess(knn_K, estimate_noise(knn_K)))
    return np.array(excesses)


def calibrate_length(count: int, curves: int = CURVES) -> dict[str, float]:
    """The threshold of one length, and beside it the false alarms of each kind, percent."""
    number = curves if count < 3000 else curves // 5
    excess_by_kind = {kind: simulate(count, kind, number) for kind in kinds_for(count)}
    limit = round(
        float(np.quantile(np.concatenate([*excess_by_kind.values()]), 1 - FALSE_ALARMS)), 2
    )
    shares = {
        kind: round(100 * float(np.mean(excess > limit)), 2)
        for kind, excess in excess_by_kind.items()
    }
    return {"threshold": limit, **shares}
