"""What do the numbers of a study say, and what to try next? Sentences about its arms."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mocov3_ds.stability.findings import WORST_FIRST, Verdict
from mocov3_ds.stability.study import Arms
from mocov3_ds.stability.study_tables import tabulate_arms

_COMPARED = (
    ("jumps", "loss jumps a run"),
    ("worst_excess", "worst loss excess, %"),
    ("knn_final", "final k-NN, %"),
)
"""columns of an arm that are compared, and what they are called in a sentence"""

_NEXT: Mapping[Verdict, str] = {
    "DIVERGED": "lower the rate or warm up longer; if the largest attention logit passed 1000, "
    "normalise queries and keys (--model.qk_norm); train in bf16, not fp16",
    "NOT LEARNING": "the features are no better than those of the random network: lower the rate, "
    "warm up longer, train longer, or look whether the probes fit the images; no spike says so",
    "RESTARTED": "freeze the patch projection (--model.patch_lr 0) or slow it (0.2), shorten the "
    "memory of the second moment (beta2 0.95), clip updates (update_clip); mocov3 stability "
    "replay RUN EVENT names the layer that did it",
    "DEGRADING": "nothing spikes, so nothing that clips will help: lower the rate, or bound the "
    "trust ratio (trust_clip); compare with a lower rate before trusting the level",
    "UNSTABLE": "beta2 0.95 first (it costs nothing), then update_clip, a frozen or slower patch "
    "projection, a lower rate; mocov3 stability replay RUN EVENT names the layer that did it",
    "BELOW ITS TWIN": "no event of its own, but another arm ends higher at the same seed: take "
    "what that arm does, or lower the rate; do not raise it",
    "TWITCHY": "accuracy is not hurt yet; before raising rate or batch, take beta2 0.95 or "
    "update_clip along",
    "NOT LOOKED": "too little is logged to see a dip, a decline or a burst: evaluate more often "
    "(--knn.every_steps), or train longer",
    "STABLE": "nothing was found: see how wide the range of good rates is (grid lr-sensitivity); a "
    "higher rate is better only where it was tried and was",
}


def compare_arms(arms: Arms) -> list[str]:
    """Each arm against the first one; a difference is claimed only where the ranges do not touch.

    A study of one arm has a sentence for each run instead.
    """
    rows = tabulate_arms(arms)
    if len(rows) < 2:
        return [f"{a}: {run.judgement.why}" for a, runs in arms.items() for run in runs]
    base = rows[0]
    sentences = []
    for row in rows[1:]:
        clauses = [
            f"{title} {row[name]:.1f} against {base[name]:.1f} ({_compare_seeds(row, base, name)})"
            for name, title in _COMPARED
            if row[name] is not None and base[name] is not None
        ]
        sentences.append(f"{row['arm']} against {base['arm']}: {'; '.join(clauses)}.")
    return sentences


def _compare_seeds(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    """How the seeds of two arms differ in a column."""
    if min(row["seeds"], base["seeds"]) < 2:
        return "one seed: no spread known"
    if row[f"{name}_max"] < base[f"{name}_min"]:
        return "lower in every seed"
    if row[f"{name}_min"] > base[f"{name}_max"]:
        return "higher in every seed"
    return "within the spread of the seeds"


def suggest_next(arms: Arms) -> list[tuple[str, str]]:
    """Which arms, and what to try next, by the worst verdict that at least half the seeds share."""
    labels: dict[Verdict, list[str]] = {}
    for label, runs in arms.items():
        verdicts = sorted((run.judgement.verdict for run in runs), key=WORST_FIRST.index)
        labels.setdefault(verdicts[(len(verdicts) - 1) // 2], []).append(label)
    return [
        (f"{verdict}: {', '.join(labels[verdict])}", _NEXT[verdict])
        for verdict in WORST_FIRST
        if verdict in labels
    ]


def choose_worst_arms(arms: Arms, count: int) -> Arms:
    """At most `count` arms, those with the worst verdicts and most loss events, in their order."""
    if len(arms) <= count:
        return arms

    def severity(label: str) -> tuple[int, float]:
        runs = arms[label]
        worst = min(WORST_FIRST.index(run.judgement.verdict) for run in runs)
        return worst, -fmean(len(run.judgement.loss_events) for run in runs)

    chosen = {*sorted(arms, key=severity)[:count]}
    return {label: runs for label, runs in arms.items() if label in chosen}
