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


def test_guessing_is_not_learning_and_a_flat_curve_needs_its_beginning() -> None:
    guess = replace(RUN, knn_K=10 + 0.4 * np.random.default_rng(0).standard_normal(200))
    assert "guessing gives 10.0 %" in judge(guess).why
    flat = replace(guess, knn_chance=0.0)  # its first evaluation is at 0.5 % of the run
    assert judge(flat).verdict == "NOT LEARNING"
    assert judge(flat).why.endswith("as it began (10.1 %), and was never higher")
    late = replace(
        flat,
        steps_T=RUN.steps_T + 2000,
        knn_steps_K=RUN.knn_steps_K + 2000,
        total_steps=RUN.total_steps + 2000,
    )  # perhaps it has learnt before
    assert judge(late).verdict == "NOT LOOKED"
    assert "neither an evaluation at step 0 nor guessing (knn_chance) is logged" in judge(late).why
    rises = replace(late, knn_K=np.linspace(20.0, 40, 200) + guess.knn_K - 10)
    assert judge(rises).verdict == "STABLE"


def test_an_evaluation_before_training_is_the_random_network() -> None:
    falls = np.append(28.0, 10 + 0.3 * np.random.default_rng(0).standard_normal(199))
    run = replace(RUN, knn_K=falls, knn_chance=0.0, probes=0, begins_random=True)
    assert run.random_knn == 28.0
    judgement = judge(replace(run, knn_K=np.append(28.0, RUN.knn_K[1:])))
    assert judgement.verdict == "STABLE"
    flat = judge(replace(run, knn_K=falls + np.append(0.0, np.full(199, 18.2))))
    assert flat.verdict == "NOT LEARNING"
    assert "that of the random network was 28.0 %" in flat.why


def test_behind_is_more_than_the_noise_of_a_pair() -> None:
    noise = Noise(0.7)
    for behind, told in ((0.9, False), (1.2, False), (2.5, True)):
        why = explain_behind(replace(RUN, twin_knn=44 + behind), noise, 44.0)
        assert bool(why) is told
    one = replace(RUN, sibling="b", sibling_knn=45.75, siblings=1)
    many = replace(one, siblings=100)  # the best of a hundred is that much better by chance
    assert "below that of the arm b" in explain_behind(one, noise, 44.0)
    assert explain_behind(many, noise, 44.0) == ""
