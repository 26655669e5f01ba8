"""Advice follows the verdicts, and the arms with most trouble are drawn."""

from dataclasses import replace

import pytest

from mocov3_ds.stability.advice import choose_worst_arms, suggest_next, suggest_rates
from mocov3_ds.stability.findings import WORST_FIRST, LossEvent, Verdict
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.same_step import cut_series
from mocov3_ds.stability.study import Arms, JudgedRun
from mocov3_ds.stability.verdict import judge
from tests.stability.judged_runs import STEPS, judged_run
from tests.stability.synthetic import healthy

HEALTHY = healthy(0).series


def judged(verdict: Verdict, loss_events: int = 0) -> JudgedRun:
    events = tuple(LossEvent(step, step, step, 0.1) for step in range(loss_events))
    judgement = replace(judge(HEALTHY), verdict=verdict, loss_events=events)
    return JudgedRun(Cell("", "", {"seed": 0}, {}), HEALTHY, judgement, None)


def test_advice_follows_the_verdict_of_half_the_seeds() -> None:
    arms = {
        "calm": [judged("STABLE"), judged("STABLE"), judged("UNSTABLE")],
        "wild": [judged("DIVERGED"), judged("STABLE")],
        "wild, too": [judged("DIVERGED")],
    }
    advice = suggest_next(arms)
    titles = [title for title, _ in advice]
    assert titles == ["DIVERGED: wild, wild, too", "STABLE: calm", "Rate"]
    assert "lower the rate" in advice[0][1]
    assert advice[-1][1].startswith("No runs that have ended differ by their rate alone")


def test_runs_of_other_programs_are_not_told_to_use_flags_of_this_one() -> None:
    ours, others = (
        " ".join(
            text
            for verdict in WORST_FIRST
            for _, text in suggest_next({"a": [judged(verdict)]}, elsewhere=elsewhere)
        )
        for elsewhere in (False, True)
    )
    for flag in ("--model.qk_norm", "mocov3 stability replay", "--knn.every_steps", "grid lr-"):
        assert flag in ours and flag not in others
    for text in (ours, others):
        assert "{" not in text and "  " not in text and " ;" not in text
        # not known of runs that went on from trained weights
        assert "random network" not in text


def at_rate(rate: float, seed: int, knn: float, verdict: Verdict = "STABLE") -> JudgedRun:
    run = judged_run("AdamW", seed, knn)
    cell = replace(run.cell, label=f"AdamW, lr {rate:g}", settings={"lr": rate, "seed": seed})
    return replace(run, cell=cell, judgement=replace(run.judgement, verdict=verdict))


def of_rates(knn: dict[float, list[float]], verdict: Verdict = "STABLE") -> Arms:
    return {
        f"lr {rate:g}": [at_rate(rate, seed, value, verdict) for seed, value in enumerate(values)]
        for rate, values in knn.items()
    }


RISING = {1e-3: [30.0, 31.0, 30.5], 1e-2: [40.0, 40.5, 41.0]}
"""accuracy by rate, one a seed"""


def test_a_higher_rate_is_advised_where_it_was_better() -> None:
    assert suggest_rates(of_rates(RISING)) == [
        (
            "Rate: AdamW",
            "Tried: 0.001, 0.01 (3 seeds). 0.01 is best on average, 10 points better than 0.001 "
            "(95 % interval 8.8 to 11). It is the highest that was tried: try 0.1 as well.",
        )
    ]
    falling = {1e-3: RISING[1e-2], 1e-2: RISING[1e-3]}
    [(_, text)] = suggest_rates(of_rates(falling))
    assert text.endswith("It is the lowest that was tried: try 0.0001 as well.")


@pytest.mark.parametrize("verdict", ["UNSTABLE", "DEGRADING", "DIVERGED"])
def test_no_higher_rate_where_the_best_is_hurt(verdict: Verdict) -> None:
    [(_, text)] = suggest_rates(of_rates(RISING, verdict))
    assert text.endswith(f"But its runs are {verdict}: a cure first, then a higher rate.")


def test_rates_of_runs_that_have_not_ended_say_nothing() -> None:
    arms = of_rates(RISING)
    [*_, last] = arms["lr 0.01"]
    going_on = replace(last, series=cut_series(last.series, STEPS // 2))
    arms = {**arms, "lr 0.01": [*arms["lr 0.01"][:2], going_on]}
    [(_, text)] = suggest_rates(arms)
    assert "(2 seeds)" in text
    arms = {**arms, "lr 0.01": [going_on]}
    [(title, _)] = suggest_rates(arms)
    assert title == "Rate"


def test_the_worst_arms_are_drawn_in_their_own_order() -> None:
    arms = {
        "a": [judged("STABLE", loss_events=9)],
        "b": [judged("UNSTABLE", loss_events=1)],
        "c": [judged("UNSTABLE", loss_events=2)],
        "d": [judged("DIVERGED")],
    }
    assert [*choose_worst_arms(arms, 4)] == ["a", "b", "c", "d"]
    assert [*choose_worst_arms(arms, 3)] == ["b", "c", "d"]
    assert [*choose_worst_arms(arms, 2)] == ["c", "d"]
    assert [*choose_worst_arms(arms, 2, first=("a", "b", "a"))] == ["a", "b"]
    assert [*choose_worst_arms(arms, 3, first=("a",))] == ["a", "c", "d"]
