"""A run against the random network, guessing, its twin and the other arms."""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.knn_noise import Noise
from mocov3_ds.stability.references import explain_behind
from mocov3_ds.stability.verdict import judge
from tests.stability.synthetic import healthy

RUN = healthy(0).series  # ends at about 44 %, 5,000 probes


def test_learning_is_told_by_the_measure_of_the_random_network() -> None:
    learnt = judge(replace(RUN, knn_at_start=24.0, knn_at_end=44.0))
    assert learnt.verdict == "STABLE"
    nothing = judge(replace(RUN, knn_at_start=24.0, knn_at_end=25.0))
    assert nothing.verdict == "NOT LEARNING"
    assert (
        "ends at 25.0 %, that of the random network was 24.0 % (standard error 0.6)" in nothing.why
    )
    half = replace(RUN, total_steps=4000, knn_at_start=24.0, knn_at_end=25.0)
    assert judge(half).verdict == "STABLE"  # it is not at its end yet


def test_guessing_is_not_learning_and_chance_unknown_says_nothing() -> None:
    guess = replace(RUN, knn_K=10 + 0.4 * np.random.default_rng(0).standard_normal(200))
    assert "guessing gives 10.0 %" in judge(guess).why
    assert judge(replace(guess, knn_chance=0.0)).verdict == "STABLE"


def test_behind_is_more_than_the_noise_of_a_pair() -> None:
    noise = Noise(0.7)
    for behind, told in ((0.9, False), (1.2, False), (2.5, True)):
        why = explain_behind(replace(RUN, twin_knn=44 + behind), noise, 44.0)
        assert bool(why) is told
    one = replace(RUN, sibling="b", sibling_knn=45.75, siblings=1)
    many = replace(one, siblings=100)  # the best of a hundred is that much better by chance
    assert "below that of the arm b" in explain_behind(one, noise, 44.0)
    assert explain_behind(many, noise, 44.0) == ""
