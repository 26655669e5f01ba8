"""False alarms of the verdicts on quiet runs, and their power: the null study.

    python -m mocov3_ds.bench verdicts                    # a minute of one core
    python -m mocov3_ds.bench verdicts --events           # those of the loss and of gradients
    python -m mocov3_ds.bench verdicts --calibrate        # sets the thresholds anew, two minutes

Quiet runs rise as training does, saturating or in a straight line, with the binomial error of the
probes and, beside it, what was measured on CIFAR-10: 0.56 points, white, heavy-tailed (t3),
remembering its past (AR 0.5 and AR 0.9) or growing from 0.3 to 1.5 points along the run. The
detectors were set on flat curves without any of this.

Shape suffixes: K = k-NN evaluations, S = falls.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mocov3_ds.bench.quiet_events import print_events, print_header, print_row
from mocov3_ds.stability.calibrate import COUNTS, KINDS, calibrate_length, kinds_for
from mocov3_ds.stability.drops import TABLE
from mocov3_ds.stability.findings import Array, Series
from mocov3_ds.stability.knn_curve import CurveFindings, examine_curve

EXCESS = 0.56
"""points of noise beside the binomial error, measured on CIFAR-10 (second differences)"""
EVALUATIONS = (50, 150, 624, 1560, 5000)
PROBES = (1000, 5000, 50_000)
NOISES = ("Gaussian", "t3", "AR 0.5")
GROWING = "growing"
QUIET_NOISES = (*NOISES, "AR 0.9", GROWING)
"""those of quiet runs; AR 0.9 from the length on from which it can be told from a fall"""
STEPS = 31_200
_FALL = Callable[[Array], Array]


@dataclass(frozen=True)
class VerdictOptions:
    """Flags of the benchmark."""

    runs: int = 50
    """quiet runs of each length, number of probes and noise; of a third so many, each fall"""
    events: bool = False
    """look at spikes of the loss and of gradients instead"""
    calibrate: bool = False
    """set the thresholds of drops anew instead, and write their table"""


def quiet_run(count: int, probes: int, noise: str, random: np.random.Generator) -> Series:
    """A run whose accuracy rises from 20 to 66 %, and nothing else.

    Args:
        count: k-NN evaluations, evenly spread over the run.
        probes: images that each one classifies.
        noise: name of the noise beside the binomial one.
        random: source of the noise.
    """
    u_K = np.arange(1, count + 1) / count
    shape_K = 1 - np.exp(-4 * u_K) if random.random() < 0.5 else u_K
    none = np.empty(0)
    series = Series(
        steps_T=none.astype(np.int64),
        loss_T=none,
        chance_loss=6.65,
        lr_T=none,
        groups=(),
        grad_linf_GT=np.empty((0, 0)),
        rms_GT=np.empty((0, 0)),
        knn_steps_K=np.round(STEPS * u_K).astype(np.int64),
        knn_K=20 + 46 * shape_K,
        probes=probes,
        knn_chance=0.1,
        total_steps=STEPS,
    )
    return measured(series, noise, random)


def measured(series: Series, noise: str, random: np.random.Generator) -> Series:
    """The run as its probes see it."""
    hits_K = random.binomial(series.probes, series.knn_K / 100)
    if noise == GROWING:
        excess_K = np.linspace(0.3, 1.5, len(hits_K)) * random.standard_normal(len(hits_K))
    else:
        excess_K = EXCESS * KINDS[noise][1](len(hits_K), random)
    return replace(series, knn_K=100 * hits_K / series.probes + excess_K)


def dip(depth: float, starts: Sequence[float] | Array = (0.6,), healing: float = 0.05) -> _FALL:
    """Sudden falls at shares of the run, each of which heals over a share of it."""
    starts_S1 = np.array(starts)[:, None]
    return lambda u_K: np.sum(
        depth * np.where(u_K >= starts_S1, np.clip(1 - (u_K - starts_S1) / healing, 0, 1), 0.0),
        axis=0,
    )


def restart(depth: float) -> _FALL:
    """A sudden fall at 60 % of the run that heals over 10 % of it."""
    return dip(depth, healing=0.1)


def decline(depth: float) -> _FALL:
    """A slow fall over the last 40 % of a run that had stopped rising."""
    return lambda u_K: depth * np.clip((u_K - 0.6) / 0.4, 0, 1)


PLANTED: Sequence[tuple[str, _FALL, Callable[[CurveFindings], bool]]] = (
    ("dip of 2", dip(2), lambda curve: bool(curve.dips)),
    ("dip of 5", dip(5), lambda curve: bool(curve.dips)),
    ("dip of 10", dip(10), lambda curve: bool(curve.dips)),
    ("8 dips of 5", dip(5, np.arange(0.2, 0.95, 0.1)), lambda curve: bool(curve.dips)),
    ("restart of 30 %", restart(18), lambda curve: any(one.restart for one in curve.dips)),
    ("decline of 3", decline(3), lambda curve: bool(curve.declines)),
    ("decline of 10", decline(10), lambda curve: bool(curve.declines)),
)
"""what is planted into a run that has saturated at 60 %, and whether it is found as that"""


def planted_run(
    count: int, probes: int, fall: _FALL, noise: str, random: np.random.Generator
) -> Series:
    """A saturated run with a fall.

    Args:
        count: k-NN evaluations, evenly spread over the run.
        probes: images that each one classifies.
        fall: points lost at each share of the run.
        noise: name of the noise beside the binomial one.
        random: source of the noise.
    """
    u_K = np.arange(1, count + 1) / count
    series = quiet_run(count, probes, noise, random)
    true_K = 20 + 40 * (1 - np.exp(-u_K / 0.1)) - fall(u_K)
    return measured(replace(series, knn_K=true_K), noise, random)


def study_null(count: int, probes: int, runs: int) -> tuple[dict[str, int], float]:
    """Quiet runs of each noise that are not called quiet, and the mean score I of all, percent."""
    alarms, scores = {}, []
    for index, noise in enumerate(QUIET_NOISES):
        if noise in KINDS and noise not in kinds_for(count):
            continue
        random = np.random.default_rng([count, probes, index])
        curves = [examine_curve(quiet_run(count, probes, noise, random)) for _ in range(runs)]
        alarms[noise] = sum(bool(curve.dips or curve.declines) for curve in curves)
        scores += [curve.lost for curve in curves]
    return alarms, float(np.mean(scores))


def study_power(count: int, probes: int, runs: int) -> dict[str, float]:
    """Share of planted falls of each kind that are found as what they are."""
    random = np.random.default_rng([count, probes, 99])
    shares = {}
    for name, fall, is_found in PLANTED:
        hits = 0
        for run in range(runs):
            noise = NOISES[run % len(NOISES)]
            hits += is_found(examine_curve(planted_run(count, probes, fall, noise, random)))
        shares[name] = hits / runs
    return shares


def run_bench(options: VerdictOptions) -> None:
    """Print the table for BENCHMARKS.md, or write the table of thresholds."""
    if options.calibrate:
        table = {}
        for count in COUNTS:
            table[str(count)] = calibrate_length(count)
            print(count, table[str(count)], flush=True)
        TABLE.write_text(json.dumps(table, indent=2) + "\n")
        return
    if options.events:
        print_events(options.runs)
        return
    alarms_of = f"not quiet, of {' / '.join(QUIET_NOISES)} runs"
    print_header(["K", "probes", alarms_of, "I", *(name for name, *_ in PLANTED)])
    for count in EVALUATIONS:
        for probes in PROBES:
            alarms, score = study_null(count, probes, options.runs)
            power = study_power(count, probes, max(options.runs // 3, 1))
            counts = " / ".join(str(alarms.get(noise, "-")) for noise in QUIET_NOISES)
            not_quiet = f"{counts} of {options.runs}"
            print_row([f"{count:,}", f"{probes:,}", not_quiet, f"{score:.3f}"], [*power.values()])
