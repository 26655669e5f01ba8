"""What to try next, by the verdicts and rates of a study? And which arms are worth a picture?"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from mocov3_ds.stability.arm_questions import collect_rates
from mocov3_ds.stability.findings import WORST_FIRST, Verdict
from mocov3_ds.stability.rate_sensitivity import choose_rate
from mocov3_ds.stability.same_step import has_ended
from mocov3_ds.stability.study import Arms

_NEXT: Mapping[Verdict, str] = {
    "DIVERGED": "lower the rate or warm up longer; if the largest attention logit passed 1000, "
    "normalise queries and keys{ (--model.qk_norm)}; train in bf16, not fp16",
    "NOT LEARNING": "the features did not get better than before training, or than guessing: lower "
    "the rate, warm up longer, train longer, or look whether the probes fit the images; no spike "
    "says so",
    "RESTARTED": "freeze the patch projection{ (--model.patch_lr 0)} or train it at a fifth of the "
    "rate, shorten the memory of the second moment (beta2 0.95), clip updates{ (update_clip); "
    "mocov3 stability replay RUN EVENT names the layer that did it}",
    "DEGRADING": "nothing spikes, so nothing that clips will help: lower the rate, or bound the "
    "trust ratio of LAMB or LARS{ (trust_clip)}; compare with a lower rate before trusting the "
    "level",
    "UNSTABLE": "beta2 0.95 first (it costs nothing), then clipped updates{ (update_clip)}, a "
    "frozen or slower patch projection, a lower rate{; mocov3 stability replay RUN EVENT names the "
    "layer that did it}",
    "BELOW ITS TWIN": "no event of its own, but another arm ends higher at the same seed: take "
    "what that arm does, or lower the rate; do not raise it",
    "TWITCHY": "accuracy is not hurt yet; before raising rate or batch, take beta2 0.95 or clipped "
    "updates{ (update_clip)} along",
    "NOT LOOKED": "too little is logged to look for everything, and each run's sentence says what "
    "is missing: evaluate more often{ (--knn.every_steps)}, log the loss, or train longer",
    "STABLE": "nothing was found: see how wide the range of good rates is{ (grid lr-sensitivity)}",
}
"""what stands in braces is of this program's runs alone"""
_OF_THIS_PROGRAM = re.compile(r"\{([^}]*)\}")
_HURT: tuple[Verdict, ...] = ("DIVERGED", "NOT LEARNING", "RESTARTED", "DEGRADING", "UNSTABLE")
"""verdicts of runs that a higher rate would hurt more"""
_NOT_TRIED = (
    "No runs that have ended differ by their rate alone, so nothing is known of a higher or lower "
    "one{; the grid lr-sensitivity tries seven}"
)


def suggest_next(arms: Arms, *, elsewhere: bool = False) -> list[tuple[str, str]]:
    """Which arms, and what to try next.

    By the worst verdict that at least half the seeds share, and by the rates that were tried.

    Args:
        arms: all runs of the study, ended or not.
        elsewhere: whether another program made them, which has no flags and grids of this one.
    """
    labels: dict[Verdict, list[str]] = {}
    for label, runs in arms.items():
        verdicts = sorted((run.judgement.verdict for run in runs), key=WORST_FIRST.index)
        labels.setdefault(verdicts[(len(verdicts) - 1) // 2], []).append(label)
    by_verdict = [
        (f"{verdict}: {', '.join(labels[verdict])}", _write_for(_NEXT[verdict], elsewhere))
        for verdict in WORST_FIRST
        if verdict in labels
    ]
    return [*by_verdict, *suggest_rates(arms, elsewhere=elsewhere)]


def _write_for(text: str, elsewhere: bool) -> str:
    """A text without its braces, or without what stands in them."""
    return _OF_THIS_PROGRAM.sub("" if elsewhere else r"\1", text)


def suggest_rates(arms: Arms, *, elsewhere: bool = False) -> list[tuple[str, str]]:
    """Which arms, and what their runs say of higher and lower rates; by runs that have ended.

    A higher rate is suggested only where the highest that was tried was better, and stable.
    `elsewhere` as in `suggest_next`.
    """
    ended = {label: [run for run in runs if has_ended(run.series)] for label, runs in arms.items()}
    advice = []
    for name, tried in collect_rates(ended).items():
        choice = choose_rate(
            tried.rates, tried.values_RS, nothing_learned=tried.chance, higher_is_better=True
        )
        text = choice.describe()
        if choice.is_raised:
            verdicts = [run.judgement.verdict for run in tried.runs[choice.best]]
            verdict = sorted(verdicts, key=WORST_FIRST.index)[(len(verdicts) - 1) // 2]
            if verdict in _HURT:
                text += f" But its runs are {verdict}: a cure first, then a higher rate."
        advice.append((f"Rate: {name}", text))
    if not advice:
        advice.append(("Rate", _write_for(_NOT_TRIED, elsewhere)))
    return advice


def choose_worst_arms(arms: Arms, count: int, first: Sequence[str] = ()) -> Arms:
    """At most `count` arms, those with the worst verdicts and most loss events, in their order.

    Args:
        arms: all arms of the study.
        count: how many there may be.
        first: labels of arms that are chosen before others, the foremost first.
    """
    if len(arms) <= count:
        return arms

    def severity(label: str) -> tuple[int, float]:
        runs = arms[label]
        worst = min(WORST_FIRST.index(run.judgement.verdict) for run in runs)
        return worst, -fmean(len(run.judgement.loss_events) for run in runs)

    chosen = {*[*dict.fromkeys([*first, *sorted(arms, key=severity)])][:count]}
    return {label: runs for label, runs in arms.items() if label in chosen}
