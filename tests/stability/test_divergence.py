"""What counts as a divergence of the loss, and as one that is unstable by its levels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.findings import Array, Series, Verdict
from mocov3_ds.stability.verdict import judge
from tests.stability.synthetic import healthy

STEPS = 2000


def with_loss(true: Array, seed: int = 0, noise: float = 0.01) -> Series:
    """A healthy run of another tool, which tells no chance level, with such a loss."""
    random = np.random.default_rng(seed)
    loss_T = true * (1 + noise * random.standard_normal(STEPS))
    return replace(healthy(seed).series, loss_T=loss_T, chance_loss=np.nan)


def not_finite(*rows: int | slice) -> Series:
    series = healthy(1).series
    loss_T = series.loss_T.copy()
    for row in rows:
        loss_T[row] = np.nan
    return replace(series, loss_T=loss_T)


@pytest.mark.parametrize(
    ("rows", "verdict", "why"),
    [
        ([700], "TWITCHY", "the loss of 1 step was not finite; 0 gradient events and 0 loss"),
        ([slice(700, 704)], "UNSTABLE", "the loss of 4 steps was not finite (0.20 %)"),
        ([300, 700, 1500], "UNSTABLE", "the loss of 3 steps was not finite (0.15 %)"),
        ([slice(700, 705)], "DIVERGED", "the loss of 5 steps was not finite from step 701 on"),
        (
            [5, slice(700, 712)],
            "DIVERGED",
            "the loss of 13 steps was not finite from step 6 on, 12",
        ),
        ([slice(0, 2000, 90)], "DIVERGED", "the loss of 23 steps was not finite from step 1 on"),
        ([-1], "DIVERGED", "the loss was not finite from step 2000 to the end"),
        ([slice(-40, None)], "DIVERGED", "the loss was not finite from step 1961 to the end"),
        ([slice(None)], "DIVERGED", "the loss was not finite from step 1 to the end"),
    ],
)
def test_losses_that_are_not_finite(rows: list[int | slice], verdict: Verdict, why: str) -> None:
    judgement = judge(not_finite(*rows))
    assert judgement.verdict == verdict and judgement.why.startswith(why), judgement.why


u = np.arange(1, STEPS + 1) / STEPS
FALL = 3 + 3.6 * np.exp(-u / 0.1)
WORSE: dict[str, tuple[Array, Verdict, str]] = {
    "jumps for good": (FALL + 5 * (u > 0.6), "DIVERGED", "the loss ended at 7.9"),
    "creeps up": (FALL + 4.5 * np.clip((u - 0.6) / 0.4, 0, 1), "DIVERGED", "the loss ended at 6.9"),
    "jumps by a third": (FALL + (u > 0.6), "UNSTABLE", "the loss rose from 3.0"),
    "creeps half way": (FALL + 2.5 * np.clip((u - 0.6) / 0.4, 0, 1), "UNSTABLE", "the loss began"),
    "negative": (-0.9 + 0.85 * np.exp(-u / 0.1) + 0.6 * (u > 0.6), "UNSTABLE", "the loss rose"),
}


@pytest.mark.parametrize("name", WORSE)
def test_a_loss_that_does_not_come_back(name: str) -> None:
    true, verdict, why = WORSE[name]
    judgement = judge(with_loss(true))
    assert judgement.verdict == verdict and judgement.why.startswith(why), judgement.why


HEALTHY: dict[str, Callable[[], Array]] = {
    "falls": lambda: FALL,
    "a queue fills": lambda: 6.5 * (1 - np.exp(-u / 0.02)) - 0.8 * u,
    "a queue fills for a quarter": lambda: 6.5 * np.clip(u / 0.25, 0.02, 1) - 0.8 * u,
    "early minimum": lambda: (
        5.5 + 1.1 * np.exp(-u / 0.004) + 0.8 * np.clip((u - 0.02) / 0.15, 0, 1) - 0.5 * u
    ),
    "rises by a sixth": lambda: FALL + 0.5 * np.clip((u - 0.6) / 0.4, 0, 1),
    "bootstraps": lambda: (
        0.12 + 1.9 * np.exp(-u / 0.01) + 0.2 * np.clip((u - 0.03) / 0.3, 0, 1) - 0.05 * u
    ),
    "minus a cosine": lambda: -0.9 + 0.85 * np.exp(-u / 0.05),
    "flat": lambda: np.full(STEPS, 5.0),
    "logged as 0 for a while": lambda: FALL * ((u < 0.6) | (u > 0.65)),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_a_healthy_loss_may_rise_early_or_a_little(name: str, noise: float) -> None:
    judgements = [judge(with_loss(HEALTHY[name](), seed, noise)) for seed in range(4)]
    if name == "logged as 0 for a while":
        assert {j.verdict for j in judgements} <= {"STABLE", "TWITCHY"}
        return
    assert {j.verdict for j in judgements} == {"STABLE"}, [j.why for j in judgements]


def test_a_jump_at_the_end_is_not_yet_for_good() -> None:
    series = with_loss(FALL + (np.arange(STEPS) >= STEPS - 3))
    assert judge(series).verdict == "TWITCHY"
