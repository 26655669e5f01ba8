"""A run against the random network, guessing, its twin and the other arms."""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.knn_noise import Noise
from mocov3_ds.stability.references import explain_behind, note_behind
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


def test_a_fall_from_what_was_learned_is_named_before_no_learning() -> None:
    """Foreign curves of continued runs: evaluated from the first hundredth on, guessing known."""
    noise_K = 0.4 * np.random.default_rng(0).standard_normal(200)
    dip_K = np.zeros(200)
    dip_K[80:90] = 10
    slides = np.linspace(60, 50, 200)
    for chance in (10.0, 0.0):
        run = replace(RUN, knn_chance=chance, probes=0)
        assert judge(replace(run, knn_K=slides + noise_K)).verdict == "DEGRADING"
        falls = judge(replace(run, knn_K=np.where(np.arange(200) < 100, 60, 40) + noise_K))
        assert falls.verdict == "RESTARTED" and "as it began" not in falls.why
        dips = judge(replace(run, knn_K=60 - dip_K + noise_K))
        assert dips.verdict == "UNSTABLE" and "1 dip" in dips.why
    # from the level of step 0 nothing was learned that could be lost
    begun = replace(RUN, knn_K=np.where(np.arange(200) < 9, 28, 15) + noise_K, begins_random=True)
    assert judge(begun).verdict == "NOT LEARNING"


def test_a_flat_curve_above_guessing_is_no_proof_without_its_beginning() -> None:
    flat_K = 60 + 0.4 * np.random.default_rng(0).standard_normal(200)
    late = replace(
        RUN,
        knn_K=flat_K,
        steps_T=RUN.steps_T + 2000,
        knn_steps_K=RUN.knn_steps_K + 2000,
        total_steps=RUN.total_steps + 2000,
    )
    judgement = judge(late)
    assert judgement.verdict == "NOT LOOKED"
    assert judgement.why.startswith(
        "nothing was found, but whether it learns cannot be told: the k-NN accuracy ends at 59.8 %"
    )
    assert judgement.why.endswith("and no evaluation at step 0 is logged")
    risen = replace(late, knn_K=np.linspace(20.0, 40, 200) + flat_K - 60)
    assert judge(risen).verdict == "STABLE"


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
    # another program's run may have begun with trained weights
    assert "that of step 0 was 28.0 %" in flat.why and "random network" not in flat.why


def test_behind_is_more_than_the_noise_of_a_pair() -> None:
    noise = Noise(0.7)
    for behind, told in ((0.9, False), (1.2, False), (2.5, True)):
        why = explain_behind(replace(RUN, twin_knn=44 + behind, twin_bar=0.0), noise, 44.0)
        assert bool(why) is told
    one = replace(RUN, sibling="b", sibling_knn=45.75, siblings=1, sibling_bar=0.0)
    many = replace(one, siblings=100)  # the best of a hundred is that much better by chance
    assert "below that of the arm b" in explain_behind(one, noise, 44.0)
    assert explain_behind(many, noise, 44.0) == ""


def test_behind_is_more_than_the_deviation_between_seeds() -> None:
    noise = Noise(0.3)
    run = replace(RUN, twin_knn=50.0, twin_bar=5.5)
    assert explain_behind(run, noise, 44.0).endswith(
        "6.0 points below that of its twin with a frozen patch projection at the same seed (44.0 "
        "against 50.0 %); noise and the deviation between seeds make 5.5"
    )
    wide = replace(run, twin_bar=6.5)
    assert explain_behind(wide, noise, 44.0) == "" and note_behind(wide, noise, 44.0) == []


def test_one_seed_of_each_is_a_note_unless_far_behind() -> None:
    noise = Noise(0.3)
    three = replace(RUN, twin_knn=47.0)
    assert explain_behind(three, noise, 44.0) == ""
    [note] = note_behind(three, noise, 44.0)
    assert "ends 3.0 points below that of its twin" in note and "one seed cannot tell" in note
    six = replace(RUN, twin_knn=50.0)
    assert "one seed alone cannot tell what the setting does" in explain_behind(six, noise, 44.0)
    assert note_behind(six, noise, 44.0) == []
    best_of_ten = replace(RUN, sibling="b", sibling_knn=49.0, siblings=10)
    assert explain_behind(best_of_ten, noise, 44.0) == ""
    assert len(note_behind(best_of_ten, noise, 44.0)) == 1
    judged = judge(three)
    assert judged.verdict == "STABLE" and "one seed cannot tell" in judged.notes[-1]
