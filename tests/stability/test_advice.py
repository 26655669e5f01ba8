"""Advice follows the verdicts, and the arms with most trouble are drawn."""

from dataclasses import replace

from mocov3_ds.stability.advice import choose_worst_arms, suggest_next
from mocov3_ds.stability.findings import LossEvent, Verdict
from mocov3_ds.stability.grid import Cell
from mocov3_ds.stability.study import JudgedRun
from mocov3_ds.stability.verdict import judge
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
    assert [title for title, _ in advice] == ["DIVERGED: wild, wild, too", "STABLE: calm"]
    assert "lower the rate" in advice[0][1]


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
