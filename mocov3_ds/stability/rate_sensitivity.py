"""How much does a wrong learning rate cost, and which rate is to be tried next?

The cost is one number for an arm, with its interval.

The sensitivity of arXiv 2309.14322: what is lost against the best rate, averaged over the rates,

    S = 1 / log(b / a) * integral from a to b of (best value - value at the rate) d log(rate)

with a trapezoid between neighbouring rates, and values no worse than those of a network that has
learned nothing; in points of accuracy, or in the unit of the loss. It is about the range of rates
that was tried and can only be compared over the same one.

The best rate of a seed is chosen by the other seeds, so that the luckiest rate of a noisy arm does
not count as sensitivity; one seed chooses for itself. As each seed helps to choose for the others,
the interval is wider than that of independent values.

A higher rate is suggested only where the highest that was tried is better than the one below by
more than the seeds' noise: of 100 arms whose rates do not differ at all at most 3 are told to.

Shape suffixes: R = rates, S = seeds.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.paired import (
    ALPHA,
    SeedSpread,
    compare_pairs,
    spread_over_seeds,
    step_of,
)


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
    rates_R, gain_RS = _read_values(rates, values_RS, nothing_learned, higher_is_better)
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


_ROUNDING = 1e-9  # points by which equal means may differ


@dataclass(frozen=True)
class Neighbour:
    """A rate beside the best one.

    Attributes:
        rate: the rate.
        lead: by how much the best rate's values are better, mean over seeds.
        interval: its 95 % t interval, of this comparison alone; NaN with one seed.
        is_told: whether that interval is above 0. Where the best rate was chosen among many by the
            same seeds, it is so more often than in one of 40 sets of equal rates.
    """

    rate: float
    lead: float
    interval: tuple[float, float]
    is_told: bool

    @property
    def is_equal(self) -> bool:
        """Whether both have the same mean, but for rounding."""
        return abs(self.lead) < _ROUNDING

    def describe(self, unit: str) -> str:
        """A clause: `2.1 points above 3e-3 (95 % interval 0.4 to 3.8: cannot be told)`."""
        if self.is_equal:
            return f"as good as {self.rate:g}"
        doubt = "" if self.is_told else ": cannot be told"
        if math.isnan(self.interval[0]):
            return f"{self.lead:.2g} {unit} better than {self.rate:g} (one seed{doubt})"
        low, high = self.interval
        return (
            f"{self.lead:.2g} {unit} better than {self.rate:g} (95 % interval {low:.2g} to "
            f"{high:.2g}{doubt})"
        )


@dataclass(frozen=True)
class RateChoice:
    """Which of the rates that were tried is best, and what to try next.

    Attributes:
        rates: rates tried, ascending.
        seeds: seeds that all of them have.
        best: rate with the best mean; NaN where none has learned anything.
        neighbours: rates below and above it that were tried.
        next_rate: rate to try beyond the best, where it is the lowest or the highest that was tried
            and, if the highest, is told from the one below; else None.
    """

    rates: tuple[float, ...]
    seeds: int
    best: float
    neighbours: tuple[Neighbour, ...]
    next_rate: float | None

    @property
    def is_raised(self) -> bool:
        """Whether a higher rate than all that were tried is suggested."""
        return self.next_rate is not None and self.next_rate > self.rates[-1]

    def describe(self, unit: str = "points") -> str:
        """Sentences: what was tried, what was best by how much, and what to try next."""
        tried = f"Tried: {', '.join(f'{rate:g}' for rate in self.rates)}"
        tried = f"{tried} ({count_noun(self.seeds, 'seed')})."
        if math.isnan(self.best):
            return f"{tried} None has learned anything: try lower rates, or a longer warm-up."
        leads = " and ".join(one.describe(unit) for one in self.neighbours)
        if all(one.is_equal for one in self.neighbours):
            return f"{tried} {self.best:g} is {leads}: none is to be tried next."
        best = f"{tried} {self.best:g} is best on average, {leads}."
        if self.rates[0] < self.best < self.rates[-1]:
            return f"{best} A lower and a higher rate were tried and were not better."
        end = "highest" if self.best == self.rates[-1] else "lowest"
        if self.next_rate is not None:
            return f"{best} It is the {end} that was tried: try {self.next_rate:.2g} as well."
        beyond = "higher" if end == "highest" else "lower"
        return (
            f"{best} It is the {end} that was tried, but nothing tells it from "
            f"{self.neighbours[0].rate:g}: more seeds before a {beyond} rate."
        )


def choose_rate(
    rates: Sequence[float], values_RS: Array, *, nothing_learned: float, higher_is_better: bool
) -> RateChoice:
    """The best of the rates that were tried, of runs that differ by rate and seed alone.

    Args:
        rates: learning rates, ascending, each above 0.
        values_RS: final accuracy or loss, (R, S), runs of one seed in a column; what is not finite
            counts as nothing learned.
        nothing_learned: value of a network that has learned nothing (chance, or the first loss).
        higher_is_better: True of accuracies, False of losses.

    Raises:
        ValueError: as `measure_sensitivity`.
    """
    rates_R, gain_RS = _read_values(rates, values_RS, nothing_learned, higher_is_better)
    count, seeds = gain_RS.shape
    tried = tuple(rates_R.tolist())
    if not gain_RS.any():
        return RateChoice(tried, seeds, math.nan, (), None)
    best = int(np.argmax(gain_RS.mean(1)))
    rows = [row for row in (best - 1, best + 1) if 0 <= row < count]
    test = compare_pairs(gain_RS[best] - gain_RS[rows], step_of(values_RS))
    neighbours = tuple(
        Neighbour(tried[row], float(mean), (float(low), float(high)), bool(p < ALPHA))
        for row, mean, low, high, p in zip(
            rows, test.mean_X, test.low_X, test.high_X, test.p_X, strict=True
        )
    )
    next_rate = None
    if (best == 0 and not neighbours[0].is_equal) or (best == count - 1 and neighbours[0].is_told):
        next_rate = tried[best] ** 2 / neighbours[0].rate  # as far again
    return RateChoice(tried, seeds, tried[best], neighbours, next_rate)


def _read_values(
    rates: Sequence[float], values_RS: Array, nothing_learned: float, higher_is_better: bool
) -> tuple[Array, Array]:
    """The rates (R,), and how far each value is better than nothing learned, (R, S).

    Raises:
        ValueError: as `measure_sensitivity`.
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
    return rates_R, gain_RS
