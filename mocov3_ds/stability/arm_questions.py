"""What do all runs of a study say together: do spikes make dips, what do wrong rates cost?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.rate_sensitivity import RateSensitivity, measure_sensitivity
from mocov3_ds.stability.spike_dips import SpikeDipTest, collect_events, compare_with_shifts
from mocov3_ds.stability.study import Arms, JudgedRun


def answer_questions(arms: Arms) -> list[str]:
    """A sentence for each question that the runs can answer.

    Args:
        arms: runs that got equally far (`comparable_runs.line_up`).
    """
    sentences = [
        f"{name[0].upper()}{name[1:]} {sensitivity.describe()} "
        f"({count_noun(sensitivity.lost.seeds, 'seed')})."
        for name, sensitivity in measure_rates(arms).items()
    ]
    spikes = look_for_dips(arms)
    return [*sentences, spikes.describe()] if spikes.spikes else sentences


def look_for_dips(arms: Arms) -> SpikeDipTest:
    """Test all runs of a study together for dips after gradient spikes.

    It is one test a page, at 5 % of its own, beside Holm's family of comparisons.
    """
    runs = [run for of_arm in arms.values() for run in of_arm]
    return compare_with_shifts([collect_events(run.series, run.judgement) for run in runs])


def measure_rates(arms: Arms) -> Mapping[str, RateSensitivity]:
    """Sensitivity of the final k-NN accuracy to the rate, of all arms that differ by it alone."""
    return {
        name: measure_sensitivity(
            one.rates, one.values_RS, nothing_learned=one.chance, higher_is_better=True
        )
        for name, one in collect_rates(arms).items()
    }


@dataclass(frozen=True, eq=False)
class RateSet:
    """Arms that differ by their rate alone, at the seeds that all of them have.

    Attributes:
        rates: their rates, ascending; two or more.
        values_RS: final k-NN accuracy in percent, (R, S).
        chance: accuracy of a network that has learned nothing, which guesses.
        runs: all their runs, by rate.
    """

    rates: tuple[float, ...]
    values_RS: Array
    chance: float
    runs: Mapping[float, Sequence[JudgedRun]]


def collect_rates(arms: Arms) -> Mapping[str, RateSet]:
    """The sets of arms that differ by their rate alone, by their name without it.

    Sets with fewer than two rates, or without a seed that all rates have, are left out.
    """
    sets: dict[str, dict[float, dict[int, JudgedRun]]] = {}
    for of_arm in arms.values():
        for run in of_arm:
            if run.cell.settings.get("lr") is not None and len(run.series.knn_K):
                by_rate = sets.setdefault(_settings_beside_rate(run.cell), {})
                by_rate.setdefault(float(run.cell.settings["lr"]), {})[run.cell.seed] = run
    collected = {}
    for by_rate in sets.values():
        rates = sorted(by_rate)
        seeds = sorted(set.intersection(*({*runs} for runs in by_rate.values())))
        if len(rates) < 2 or not seeds:
            continue
        first = by_rate[rates[0]][seeds[0]]
        values_RS = np.array(
            [[by_rate[rate][seed].judgement.final_knn for seed in seeds] for rate in rates]
        )
        runs = {rate: tuple(by_rate[rate].values()) for rate in rates}
        chance = first.series.knn_chance
        collected[_name_set(first.cell)] = RateSet(tuple(rates), values_RS, chance, runs)
    return collected


def _settings_beside_rate(cell: Cell) -> str:
    other_settings = {
        key: value for key, value in cell.settings.items() if key not in ("lr", "seed")
    }
    return json.dumps(other_settings, sort_keys=True, default=str)


def _name_set(cell: Cell) -> str:
    """The label of an arm without its rate."""
    terms = [term for term in cell.label.split(", ") if not term.startswith("lr ")]
    return ", ".join(terms) or "the arm"
