"""Is a run as good as it ought to be, whatever its shape? Step 0, chance, and other arms tell.

A rate that is far too high leaves no dip behind, as there is nothing to fall from; and the paper's
loss of accuracy shows beside a stabler twin alone. But runs of one setting differ, too, so what a
run is behind another one is weighed by how far the seeds of a study lie apart (`other_arms`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from mocov3_ds.stability.drops import FEWEST
from mocov3_ds.stability.findings import Decline, Dip, Series
from mocov3_ds.stability.knn_noise import Noise, binomial_error
from mocov3_ds.stability.outliers import FALSE_ALARMS

ERRORS = 2.0
"""standard errors above the random network, or above chance, that count as learning"""
LEAST_BEHIND = 1.0
"""points that a run must be behind another arm, at least"""
ONE_SEED_BAR = 4.0
"""points that it must be behind its twin where no seed tells how far runs of one setting lie apart:
the paired difference of a pilot deviated by 1.5 from seed to seed, and 99.6 % of such pairs of
equal settings are nearer (at 2.1, as in wilder miniatures, 97 %). Of the best of several arms it
grows as a normal quantile does."""
AS_UNTRAINED = 0.90
"""share of its chance level above which a loss has hardly begun to fall"""
AT_START = 0.01
"""share of the run within which the first evaluation is that of a network that knows nothing"""
ENDED = 0.9
"""share of its planned length after which a run may be said to have learnt nothing"""
_AVERAGED = 3  # evaluations that make the final accuracy


def explain_no_learning(
    series: Series,
    noise: Noise,
    final: float,
    final_loss: float,
    falls: Sequence[Dip | Decline] = (),
) -> str:
    """Why the features count as no better than before training; empty if they do not.

    A curve that fell from above all that is known of an untrained network is told by its falls.

    Args:
        series: what the run has logged.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent; NaN without evaluations.
        final_loss: median loss of its end.
        falls: its dips and its declines, in any order.
    """
    if len(series.steps_T) == 0 or series.steps_T[-1] < ENDED * series.total_steps:
        return ""
    if any(_had_learned(series, noise, fall) for fall in falls):
        return ""
    start = series.random_knn
    end = final if series.knn_at_start is None else series.knn_at_end
    if start is not None and end is not None:
        error = float(binomial_error(start, series.probes))
        error = error or _error_of_final(series, noise, final)
        if end < start + ERRORS * error:
            # what another program's run began with may be trained weights
            origin = "step 0" if series.knn_at_start is None else "the random network"
            return (
                f"the k-NN accuracy ends at {end:.1f} %, that of {origin} was "
                f"{start:.1f} % (standard error {error:.1f})"
            )
    error = _error_of_final(series, noise, final)
    chance = series.knn_chance
    if chance > 0 and final < chance + ERRORS * error:
        return f"the k-NN accuracy ends at {final:.1f} %, guessing gives {chance:.1f} %"
    return _explain_flat(series, noise, final, final_loss)


def _had_learned(series: Series, noise: Noise, fall: Dip | Decline) -> bool:
    """Whether the accuracy before a fall was above that of step 0 and of guessing, if known."""
    before_K = series.knn_K[series.knn_steps_K < fall.first][-_AVERAGED:]
    before_K = before_K if len(before_K) else series.knn_K[:_AVERAGED]
    level = float(np.mean(before_K))
    error = noise.of_mean(len(before_K))
    untrained = max(series.random_knn or 0.0, series.knn_chance)
    return level > untrained + ERRORS * max(error, float(binomial_error(untrained, series.probes)))


def _explain_flat(series: Series, noise: Noise, final: float, final_loss: float) -> str:
    """Why a curve counts as that of a network that never learnt, by its own beginning alone."""
    if len(series.knn_K) < FEWEST:
        return ""
    first, bar = _beginning(series, noise, final)
    if final >= first + bar:
        return ""
    position = "as it began" if final > first - bar else "below where it began"
    sentence = f"the k-NN accuracy ends at {final:.1f} % {position} ({first:.1f} %)"
    if final_loss > AS_UNTRAINED * series.chance_loss:
        share = 100 * final_loss / series.chance_loss
        return f"{sentence}, and the loss at {share:.0f} % of its chance level"
    tenths = np.array_split(series.knn_K, min(10, len(series.knn_K) // _AVERAGED))
    highest = max(float(np.mean(tenth)) for tenth in tenths)
    if series.random_knn is None and _is_from_start(series) and highest < first + bar:
        return f"{sentence}, and was never higher"
    return ""


def _is_from_start(series: Series) -> bool:
    """Whether the first evaluation is early enough to be that of a network that knows nothing."""
    return int(series.knn_steps_K[0]) <= AT_START * series.total_steps


def explain_unknown_learning(series: Series, noise: Noise, final: float) -> str:
    """Why it cannot be said whether a run learns; empty where it can, or where it does.

    Args:
        series: what the run has logged.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent.
    """
    if series.random_knn is not None or len(series.knn_K) < FEWEST:
        return ""
    if series.knn_chance > 0 and _is_from_start(series):
        return ""  # `explain_no_learning` can tell
    first, bar = _beginning(series, noise, final)
    if abs(final - first) >= bar:
        return ""
    missing = (
        "no evaluation at step 0 is logged"
        if series.knn_chance > 0
        else "neither an evaluation at step 0 nor guessing (knn_chance) is logged"
    )
    return (
        f"whether it learns cannot be told: the k-NN accuracy ends at {final:.1f} % as it began "
        f"({first:.1f} %), and {missing}"
    )


def _beginning(series: Series, noise: Noise, final: float) -> tuple[float, float]:
    """Mean of the first evaluations, and how far from it the final accuracy may be by chance."""
    bar = ERRORS * math.sqrt(2) * _error_of_final(series, noise, final)
    return float(np.mean(series.knn_K[:_AVERAGED])), bar


@dataclass(frozen=True)
class _Behind:
    """A run that ends below another one.

    Attributes:
        where: a clause: how far, below which one, at which values.
        points: how far it is below.
        noise: points that the noise of two evaluations makes in one quiet pair of a hundred.
        bar: points that noise and the deviation of runs make together, as far as that is known.
        is_one_seed: whether nothing but `ONE_SEED_BAR` is known of the deviation.
    """

    where: str
    points: float
    noise: float
    bar: float
    is_one_seed: bool


def explain_behind(series: Series, noise: Noise, final: float) -> str:
    """Why the run counts as worse than a stabler one at the same seed; empty if it does not.

    Args:
        series: the run, with its twin's or its best sibling's final accuracy.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent.
    """
    for one in _look_behind(series, noise, final):
        if one.points > one.bar:
            if one.is_one_seed:
                return (
                    f"{one.where}; one seed alone cannot tell what the setting does, but runs of "
                    f"one setting seldom differ by {one.bar:.1f} points"
                )
            return f"{one.where}; noise and the deviation between seeds make {one.bar:.1f}"
    return ""


def note_behind(series: Series, noise: Noise, final: float) -> list[str]:
    """What a run is below others at its seed where one seed cannot tell it, a sentence each."""
    return [
        f"{one.where}: one seed cannot tell that from the deviation between runs of one setting"
        for one in _look_behind(series, noise, final)
        if one.is_one_seed and one.noise < one.points <= one.bar
    ]


def _look_behind(series: Series, noise: Noise, final: float) -> Iterator[_Behind]:
    """The run beside its twin and beside the best other arm, where those are known.

    The bar of noise is the error of a difference of two such runs that one quiet pair in a hundred
    exceeds, of the best of several arms accordingly more.
    """
    error = math.sqrt(2) * _error_of_final(series, noise, final)
    for name, reference, arms, of_seeds in (
        ("its twin with a frozen patch projection", series.twin_knn, 1, series.twin_bar),
        (f"the arm {series.sibling}", series.sibling_knn, series.siblings, series.sibling_bar),
    ):
        if reference is None:
            continue
        quantile = one_sided_quantile(FALSE_ALARMS / max(arms, 1))
        of_noise = max(LEAST_BEHIND, quantile * error)
        is_one_seed = math.isnan(of_seeds)
        if is_one_seed:
            of_seeds = ONE_SEED_BAR * quantile / one_sided_quantile(FALSE_ALARMS)
        yield _Behind(
            f"the k-NN accuracy ends {reference - final:.1f} points below that of {name} at the "
            f"same seed ({final:.1f} against {reference:.1f} %)",
            reference - final,
            of_noise,
            max(of_noise, of_seeds),
            is_one_seed,
        )


def one_sided_quantile(share: float) -> float:
    """Standard deviations above the mean that this share of normal values exceeds."""
    return -float(special.ndtri(share))


def _error_of_final(series: Series, noise: Noise, final: float) -> float:
    """Standard error of the median of the last three evaluations, points."""
    if math.isnan(final):
        return math.nan
    # a median of three Gaussian values has 1.16 times the error of their mean
    curve = 1.16 * noise.of_mean(min(_AVERAGED, max(len(series.knn_K), 1)))
    return max(curve, float(binomial_error(final, series.probes)) / math.sqrt(2))
