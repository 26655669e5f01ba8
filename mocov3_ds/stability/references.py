"""Is a run as good as it ought to be, whatever its shape? Step 0, chance, and other arms tell.

A rate that is far too high leaves no dip behind, as there is nothing to fall from; and the paper's
loss of accuracy shows beside a stabler twin alone.
"""

import math

import numpy as np
from scipy import special

from mocov3_ds.stability.drops import FEWEST
from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.knn_noise import Noise, binomial_error
from mocov3_ds.stability.outliers import FALSE_ALARMS

ERRORS = 2.0
"""standard errors above the random network, or above chance, that count as learning"""
LEAST_BEHIND = 1.0
"""points that a run must be behind another arm, at least"""
AS_UNTRAINED = 0.90
"""share of its chance level above which a loss has hardly begun to fall"""
AT_START = 0.01
"""share of the run within which the first evaluation is that of a network that knows nothing"""
ENDED = 0.9
"""share of its planned length after which a run may be said to have learnt nothing"""
_AVERAGED = 3  # evaluations that make the final accuracy


def explain_no_learning(series: Series, noise: Noise, final: float, final_loss: float) -> str:
    """Why the features count as no better than the random network's; empty if they do not.

    Args:
        series: what the run has logged.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent; NaN without evaluations.
        final_loss: median loss of its end.
    """
    if len(series.steps_T) == 0 or series.steps_T[-1] < ENDED * series.total_steps:
        return ""
    start = series.random_knn
    end = final if series.knn_at_start is None else series.knn_at_end
    if start is not None and end is not None:
        error = float(binomial_error(start, series.probes))
        error = error or _error_of_final(series, noise, final)
        if end < start + ERRORS * error:
            return (
                f"the k-NN accuracy ends at {end:.1f} %, that of the random network was "
                f"{start:.1f} % (standard error {error:.1f})"
            )
    error = _error_of_final(series, noise, final)
    chance = series.knn_chance
    if chance > 0 and final < chance + ERRORS * error:
        return f"the k-NN accuracy ends at {final:.1f} %, guessing gives {chance:.1f} %"
    return _explain_flat(series, noise, final, final_loss)


def _explain_flat(series: Series, noise: Noise, final: float, final_loss: float) -> str:
    """Why a curve counts as that of a network that never learnt, by its own beginning alone."""
    if len(series.knn_K) < FEWEST:
        return ""
    first, bar = _beginning(series, noise, final)
    if final >= first + bar:
        return ""
    sentence = f"the k-NN accuracy ends at {final:.1f} % as it began ({first:.1f} %)"
    if final_loss > AS_UNTRAINED * series.chance_loss:
        share = 100 * final_loss / series.chance_loss
        return f"{sentence}, and the loss at {share:.0f} % of its chance level"
    tenths = np.array_split(series.knn_K, min(10, len(series.knn_K) // _AVERAGED))
    highest = max(float(np.mean(tenth)) for tenth in tenths)
    is_from_start = series.knn_steps_K[0] <= AT_START * series.total_steps
    if series.random_knn is None and is_from_start and highest < first + bar:
        return f"{sentence}, and was never higher"
    return ""


def explain_unknown_learning(series: Series, noise: Noise, final: float) -> str:
    """Why it cannot be said whether a run learns; empty where it can, or where it does.

    Args:
        series: what the run has logged.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent.
    """
    if series.random_knn is not None or series.knn_chance > 0 or len(series.knn_K) < FEWEST:
        return ""
    first, bar = _beginning(series, noise, final)
    if abs(final - first) >= bar:
        return ""
    return (
        f"whether it learns was not: the k-NN accuracy ends at {final:.1f} % as it began "
        f"({first:.1f} %), and neither an evaluation at step 0 nor guessing (knn_chance) is logged"
    )


def _beginning(series: Series, noise: Noise, final: float) -> tuple[float, float]:
    """Mean of the first evaluations, and how far from it the final accuracy may be by chance."""
    bar = ERRORS * math.sqrt(2) * _error_of_final(series, noise, final)
    return float(np.mean(series.knn_K[:_AVERAGED])), bar


def explain_behind(series: Series, noise: Noise, final: float) -> str:
    """Why the run counts as worse than a stabler one at the same seed; empty if it does not.

    The bar is the error of a difference of two such runs that one quiet pair in a hundred exceeds,
    of the best of several arms accordingly more.

    Args:
        series: the run, with its twin's or its best sibling's final accuracy.
        noise: noise of its k-NN curve.
        final: its final accuracy, percent.
    """
    error = math.sqrt(2) * _error_of_final(series, noise, final)
    for name, reference, arms in (
        ("its twin with a frozen patch projection", series.twin_knn, 1),
        (f"the arm {series.sibling}", series.sibling_knn, series.siblings),
    ):
        if reference is None:
            continue
        bar = max(LEAST_BEHIND, -float(special.ndtri(FALSE_ALARMS / max(arms, 1))) * error)
        if reference - final > bar:
            return (
                f"the k-NN accuracy ends {reference - final:.1f} points below that of {name} at "
                f"the same seed ({final:.1f} against {reference:.1f} %; chance makes {bar:.1f})"
            )
    return ""


def _error_of_final(series: Series, noise: Noise, final: float) -> float:
    """Standard error of the median of the last three evaluations, points."""
    if math.isnan(final):
        return math.nan
    # a median of three Gaussian values has 1.16 times the error of their mean
    curve = 1.16 * noise.of_mean(min(_AVERAGED, max(len(series.knn_K), 1)))
    return max(curve, float(binomial_error(final, series.probes)) / math.sqrt(2))
