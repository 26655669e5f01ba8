"""How much does a wrong learning rate cost? One number for an arm, with its interval.

The sensitivity of arXiv 2309.14322: what is lost against the best rate, averaged over the rates,

    S = 1 / log(b / a) * integral from a to b of (best value - value at the rate) d log(rate)

with a trapezoid between neighbouring rates, and values no worse than those of a network that has
learned nothing; in points of accuracy, or in the unit of the loss. It is about the range of rates
that was tried and can only be compared over the same one.

The best rate of a seed is chosen by the other seeds, so that the luckiest rate of a noisy arm does
not count as sensitivity; one seed chooses for itself. As each seed helps to choose for the others,
the interval is wider than that of independent values.

Shape suffixes: R = rates, S = seeds.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.paired import SeedSpread, spread_over_seeds


@dataclass(frozen=True)
class RateSensitivity:
    """What wrong rates cost an arm.

    Attributes:
        rates: rates tried, ascending.
        best_rate: rate with the best mean over seeds.
        lost: S of each seed summarised: mean, its 95 % interval, deviation between seeds.
    """

    rates: tuple[float, ...]
    best_rate: float
    lost: SeedSpread

    def describe(self, unit: str = "points") -> str:
        """A clause: `loses 3.1 points (95 % interval ...) against its best rate, 2e-3, ...`."""
        low, high = self.lost.mean_interval
        interval = "one seed" if self.lost.seeds < 2 else f"95 % interval {low:.2g} to {high:.2g}"
        return (
            f"loses {self.lost.mean:.2g} {unit} ({interval}) against its best rate, "
            f"{self.best_rate:g}, on average over rates from {self.rates[0]:g} to "
            f"{self.rates[-1]:g}"
        )


def measure_sensitivity(
    rates: Sequence[float], values_RS: Array, *, nothing_learned: float, higher_is_better: bool
) -> RateSensitivity:
    """Sensitivity to the rate, of values of runs that differ by rate and seed alone.

    Args:
        rates: learning rates, ascending, each above 0.
        values_RS: final accuracy or loss, (R, S); what is not finite counts as nothing learned.
        nothing_learned: value of a network that has learned nothing (chance, or the first loss).
        higher_is_better: True of accuracies, False of losses.

    Raises:
        ValueError: fewer than two rates, rates that do not ascend or are not above 0, or an array
            of another shape.
    """
    rates_R = np.asarray(rates, float)
    if len(rates_R) < 2 or np.any(np.diff(rates_R) <= 0) or rates_R[0] <= 0:
        raise ValueError(f"rates {[*rates]} must be two or more, above 0, ascending.")
    if values_RS.ndim != 2 or len(values_RS) != len(rates_R) or not values_RS.shape[1]:
        shape = f"({len(rates_R)}, seeds)"
        raise ValueError(f"values have shape {values_RS.shape}; it must be {shape}.")
    sign = 1.0 if higher_is_better else -1.0
    finite_RS = np.where(np.isfinite(values_RS), values_RS, nothing_learned)
    gain_RS = np.maximum(sign * (finite_RS - nothing_learned), 0.0)
    seeds = gain_RS.shape[1]
    # share of the logarithmic axis that stands for each rate: trapezoids
    gaps = np.diff(np.log(rates_R))
    weight_R = (np.append(gaps, 0.0) + np.insert(gaps, 0, 0.0)) / (2 * gaps.sum())
    others_RS = gain_RS.sum(1, keepdims=True) - gain_RS if seeds > 1 else gain_RS
    best_S = np.argmax(others_RS, axis=0)
    lost_S = gain_RS[best_S, np.arange(seeds)] - weight_R @ gain_RS
    return RateSensitivity(
        rates=tuple(rates_R.tolist()),
        best_rate=float(rates_R[np.argmax(gain_RS.sum(1))]),
        lost=_widen_interval(spread_over_seeds(lost_S.tolist())),
    )


def _widen_interval(lost: SeedSpread) -> SeedSpread:
    """The interval for values whose best rate the same other seeds chose (Nadeau, Bengio 2003)."""
    if lost.seeds < 2:
        return lost
    factor = math.sqrt(1 + lost.seeds / (lost.seeds - 1))
    reach = factor * (lost.mean_interval[1] - lost.mean)
    return dataclasses.replace(lost, mean_interval=(lost.mean - reach, lost.mean + reach))
