"""Does a spike of the gradient make a dip of the k-NN accuracy? Tested against shifted spikes.

The paper says so (arXiv 2104.02057, Sec. 4.1, Fig. 4). Counted is the share of spikes that a dip
follows within a window, and the mean curve around all spikes. The control is the same run with its
spikes moved by whole windows: the run is cut into stretches of `STRETCH` windows, and the spikes of
each stretch go round in it together, each stretch on its own. So their number, spacing and clusters
stay, a phase in which both are frequent, e.g. of the highest rate, is no cause, no shift is shorter
than the window, and a single run has as many controls as its stretches allow. Such shifts are a
group, which makes p exact where spikes and dips are independent within a stretch.

Shape suffixes: E = spikes, B = stretches, N = shifts, D = draws, K = k-NN evaluations, W = points
around a spike.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.events import merge_distance
from mocov3_ds.stability.findings import Array, Judgement, Series, Steps
from mocov3_ds.stability.paired import ALPHA
from mocov3_ds.stability.trailing import row_spacing

WINDOW_EVALUATIONS = 3
"""a dip that opens within so many evaluations after a spike is one that it made"""
STRETCH = 5
"""windows of a stretch in which spikes go round: p of one with a spike is a fifth at least"""
DRAWS = 2000
"""draws of the shifts of all stretches together"""
BEFORE, AFTER = 4, 10
"""evaluations around a spike of the mean curve"""
_TREND = 4 * (BEFORE + AFTER) + 1  # evaluations of the running median that a residual is from
_QUANTILE = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True, eq=False)
class SpikesAndDips:
    """What one run has for the test.

    Attributes:
        spikes_E: steps at which a spike of the run begins, ascending.
        dips_E: steps of the evaluations that open a dip, ascending.
        steps_K: steps of the k-NN evaluations, ascending.
        knn_K: accuracy in percent at each; NaN where it was not finite.
        delays_E: steps from there to the last layer's beginning, after which a dip may open as
            well; None = all layers begin together.
    """

    spikes_E: Steps
    dips_E: Steps
    steps_K: Steps
    knn_K: Array
    delays_E: Steps | None = None


@dataclass(frozen=True, eq=False)
class SpikeDipTest:
    """Whether spikes are followed by dips more often than by chance, over all runs.

    Attributes:
        runs: runs with a spike, evaluated around it.
        spikes: spikes of these runs.
        followed: spikes that a dip followed within the window.
        share_interval: 95 % Wilson interval of followed / spikes.
        control: mean share over shifted spikes.
        p: one-sided permutation p of `followed`; 1 without spikes or dips.
        window: longest window over the runs, in steps.
        offsets_W: evaluations from a spike, negative before it.
        average_W: mean of the accuracy's residual (accuracy minus its running median) over spikes,
            points; NaN without spikes.
        low_W: 2.5 % quantile of the same mean over shifted spikes.
        high_W: 97.5 % quantile.
    """

    runs: int
    spikes: int
    followed: int
    share_interval: tuple[float, float]
    control: float
    p: float
    window: int
    offsets_W: Steps
    average_W: Array
    low_W: Array
    high_W: Array

    @property
    def share(self) -> float:
        """Share of the spikes that a dip followed; NaN without spikes."""
        return self.followed / self.spikes if self.spikes else math.nan

    def describe(self) -> str:
        """A sentence for a page."""
        if not self.spikes:
            return "No gradient spike between two k-NN evaluations, so nothing follows about dips."
        low, high = (100 * end for end in self.share_interval)
        doubt = "" if self.p < ALPHA else ", so that spikes make dips cannot be told"
        return (
            f"{self.followed} of {count_noun(self.spikes, 'gradient spike')} "
            f"({100 * self.share:.0f} %, 95 % interval {low:.0f} to {high:.0f}) in "
            f"{count_noun(self.runs, 'run')} are followed by a dip within {self.window} steps, "
            f"{100 * self.control:.0f} % of the same spikes at shifted places (p {self.p:.2g}"
            f"{doubt})."
        )


def collect_events(series: Series, judgement: Judgement) -> SpikesAndDips:
    """Spikes and dips of a run.

    A spike is all gradient events, of any layer, that begin no later than a window after the others
    end, or than bursts are merged and the first layer leads the last one: it moves one layer after
    the other, and counts once.
    """
    window = WINDOW_EVALUATIONS * row_spacing(series.knn_steps_K)
    lead = judgement.lead
    lead_steps = abs(lead.median) if lead is not None and math.isfinite(lead.median) else 0.0
    distance = max(window, merge_distance(series.steps_T) + lead_steps)
    onsets: list[tuple[int, int]] = []  # first and last beginning of each spike
    end = -math.inf
    for event in judgement.gradient_events:  # by first step
        if event.first > end + distance:
            onsets.append((event.first, event.first))
        onsets[-1] = (onsets[-1][0], event.first)
        end = max(end, event.last)
    first_E2 = np.array(onsets, np.int64).reshape(-1, 2)
    return SpikesAndDips(
        spikes_E=first_E2[:, 0],
        dips_E=np.array([dip.first for dip in judgement.dips], np.int64),
        steps_K=series.knn_steps_K,
        knn_K=series.knn_K,
        delays_E=first_E2[:, 1] - first_E2[:, 0],
    )


def compare_with_shifts(runs: Sequence[SpikesAndDips], seed: int = 0) -> SpikeDipTest:
    """Test all runs together; each stretch of each is shifted on its own.

    The window is three evaluations of the run. Spikes before the first evaluation or after the last
    do not count.

    Args:
        runs: what each run has.
        seed: seed of the draws of shifts; near 5 % p moves by 0.005 with it.
    """
    prepared = [one for one in map(_prepare_run, runs) if one is not None]
    offsets_W = np.arange(-BEFORE, AFTER + 1)
    if not prepared:
        unknown_W = np.full(len(offsets_W), math.nan)
        nothing = (math.nan, math.nan)
        return SpikeDipTest(
            0, 0, 0, nothing, math.nan, 1.0, 0, offsets_W, unknown_W, unknown_W, unknown_W
        )
    generator = np.random.default_rng(seed)
    hits_D, control_D = np.zeros(DRAWS), np.zeros(DRAWS)
    sums_DW = np.zeros((DRAWS, len(offsets_W)))
    for run in prepared:
        # p is of all shifts, as a group has them; what is shown beside is of true shifts alone
        least_B, shape = np.minimum(1, run.shifts_B - 1), (DRAWS, len(run.shifts_B))
        drawn_DB = generator.integers(0, run.shifts_B, shape)
        away_DB = generator.integers(least_B, run.shifts_B, shape)
        drawn_DB[0] = away_DB[0] = 0  # the run as it is
        for stretch, (drawn_D, away_D) in enumerate(zip(drawn_DB.T, away_DB.T, strict=True)):
            hits_D += run.hits_BN[stretch, drawn_D]
            control_D += run.hits_BN[stretch, away_D]
            sums_DW += run.sums_BNW[stretch, away_D]
    spikes = sum(run.spikes for run in prepared)
    means_DW = sums_DW / spikes
    low_W, high_W = np.quantile(means_DW[1:], [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return SpikeDipTest(
        runs=len(prepared),
        spikes=spikes,
        followed=int(hits_D[0]),
        share_interval=wilson_interval(int(hits_D[0]), spikes),
        control=float(control_D[1:].mean() / spikes),
        p=float(np.mean(hits_D >= hits_D[0])),
        window=max(run.window for run in prepared),
        offsets_W=offsets_W,
        average_W=means_DW[0],
        low_W=low_W,
        high_W=high_W,
    )


@dataclass(frozen=True, eq=False)
class _ShiftedRun:
    """Counts of each stretch of a run at each shift, of which the first is the run as it is."""

    spikes: int
    window: int
    shifts_B: Steps
    hits_BN: Steps
    sums_BNW: Array


def _prepare_run(run: SpikesAndDips) -> _ShiftedRun | None:
    """Counts of the stretches with spikes; None where no spike lies between evaluations."""
    if len(run.steps_K) < BEFORE + AFTER:
        return None
    first, last = int(run.steps_K[0]), int(run.steps_K[-1])
    inside = (run.spikes_E >= first) & (run.spikes_E < last)
    spikes_E = run.spikes_E[inside]
    if not len(spikes_E):
        return None
    delays_E = np.zeros_like(spikes_E) if run.delays_E is None else run.delays_E[inside]
    every = row_spacing(run.steps_K)
    window = WINDOW_EVALUATIONS * every
    windows = max((last - first) // window, 1)
    stretches = max(windows // STRETCH, 1)
    place_E = (spikes_E - first) // window
    stretch_E = np.minimum(place_E // STRETCH, stretches - 1)
    start_E = STRETCH * stretch_E
    # the last stretch has the windows that are left; what lies behind the last window stays
    shifts_E = np.where(stretch_E == stretches - 1, windows - start_E, STRETCH)
    shifts_E[place_E >= windows] = 1
    shift_N = np.arange(max(int(shifts_E.max()), 1))
    moved_NE = start_E + (place_E - start_E + shift_N[:, None]) % shifts_E
    moved_NE = np.where(shifts_E == 1, spikes_E, spikes_E + window * (moved_NE - place_E))
    grid_NEW = moved_NE[..., None] + every * np.arange(-BEFORE, AFTER + 1)
    around_NEW = np.interp(grid_NEW, run.steps_K, residual_curve(run.knn_K))
    # those that stay are a stretch of their own
    key_E = np.where(shifts_E == 1, stretches, stretch_E)
    firsts_B = np.unique(key_E, return_index=True)[1]
    members = [slice(*ends) for ends in itertools.pairwise([*firsts_B, len(key_E)])]
    hits = [
        count_followed(moved_NE[:, of_one], run.dips_E, window + delays_E[of_one])
        for of_one in members
    ]
    return _ShiftedRun(
        spikes=len(spikes_E),
        window=window,
        shifts_B=shifts_E[firsts_B],
        hits_BN=np.stack(hits),
        sums_BNW=np.stack([around_NEW[:, of_one].sum(1) for of_one in members]),
    )


def count_followed(spikes_NE: Steps, dips_E: Steps, window: Steps | int) -> Steps:
    """Spikes of each row that a dip follows within so many steps (one number, or (E,)), (N,)."""
    if not len(dips_E):
        return np.zeros(len(spikes_NE), np.int64)
    next_NE = np.searchsorted(dips_E, spikes_NE, side="right")
    there_NE = next_NE < len(dips_E)
    wait_NE = dips_E[np.minimum(next_NE, len(dips_E) - 1)] - spikes_NE
    return np.sum(there_NE & (wait_NE <= window), axis=1)


def residual_curve(knn_K: Array) -> Array:
    """Accuracy minus its running median over 57 evaluations, (K,); 0 where it was not finite."""
    finite = np.flatnonzero(np.isfinite(knn_K))
    if not len(finite):
        return np.zeros(len(knn_K))
    filled_K = np.interp(np.arange(len(knn_K)), finite, knn_K[finite])
    size = min(_TREND, 2 * ((len(filled_K) - 1) // 2) + 1)
    trend_K = ndimage.median_filter(filled_K, size=size, mode="nearest")
    return np.where(np.isfinite(knn_K), filled_K - trend_K, 0.0)


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share of independent trials (Wilson 1927); (NaN, NaN) without any."""
    if not trials:
        return math.nan, math.nan
    share, z2 = hits / trials, _QUANTILE**2 / trials
    middle = (share + z2 / 2) / (1 + z2)
    reach = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)
