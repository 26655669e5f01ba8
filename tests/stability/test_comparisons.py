"""Sentences about arms claim no more than their seeds tell after Holm over the page."""

import dataclasses
import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from mocov3_ds.stability import comparisons, paired
from mocov3_ds.stability.comparable_runs import line_up
from mocov3_ds.stability.planned import PlannedComparison
from mocov3_ds.stability.study import read_study
from mocov3_ds.stability.study_tables import tabulate_arms
from tests.stability.judged_runs import JUDGEMENT, judged_run

PILOT = {
    "knn_final": {
        "frozen": {0: 28.45, 1: 29.05, 2: 26.55, 3: 25.55},
        "trained": {0: 24.40, 1: 25.40, 2: 25.85, 3: 23.35},
        "short": {0: 22.80, 1: 27.05, 2: 25.45},
    }
}


def test_the_sentence_of_a_pilot() -> None:
    [alone] = comparisons.compare_values(PILOT, [("trained", "frozen")])
    assert alone.seeds == (0, 1, 2, 3) and alone.is_told
    assert alone.describe() == (
        "is 2.7 points below frozen (95 % interval 0.2 to 5.1, 4 seeds, Holm p 0.04)"
    )
    first, second = comparisons.compare_values(PILOT, [("trained", "frozen"), ("short", "frozen")])
    assert first.holm_p == pytest.approx(2 * alone.p) and not first.is_told
    assert first.describe() == (
        "is 2.7 points below frozen (95 % interval 0.2 to 5.1, 4 seeds, Holm p 0.08: cannot be "
        "told at 4 seeds)"
    )
    assert second.seeds == (0, 1, 2)
    [higher] = comparisons.compare_values(PILOT, [("frozen", "trained")])
    assert higher.describe().startswith("is 2.7 points above trained (95 % interval 0.2 to 5.1")
    # a difference of the size that four seeds show is larger than the one that was measured
    assert alone.shown == paired.smallest_difference(alone.sd, 4, 1) > 2.65


def test_the_family_is_the_page() -> None:
    """Holm by a loop over p from all metrics and pairs; one seed is told, but not counted."""
    random = np.random.default_rng(0)
    values = {
        metric: {
            arm: dict(enumerate(random.normal(apart * index, 1, 4)))
            for index, arm in enumerate("abcd")
        }
        for metric, apart in {"knn_final": 9, "jumps": 0, "worst_excess": 0}.items()
    }
    values["jumps"]["d"] = {0: 3.0, 9: 1.0}
    found = comparisons.compare_values(values, [("b", "a"), ("c", "a"), ("d", "a")])
    assert len(found) == 9
    single = [one for one in found if math.isnan(one.p)]
    assert [(one.arm, one.metric, one.seeds) for one in single] == [("d", "jumps", (0,))]
    assert single[0].describe().endswith("(one seed: cannot be told)")
    assert single[0].shown == math.inf
    ordered, largest = sorted((o for o in found if o not in single), key=lambda one: one.p), 0.0
    for rank, one in enumerate(ordered):
        largest = max(largest, min(1.0, one.p * (8 - rank)))
        assert one.holm_p == pytest.approx(largest)
    assert 0 < sum(one.is_told for one in found) < 8


def test_no_seed_in_common_is_no_comparison() -> None:
    values = {"knn_final": {"a": {0: 1.0}, "b": {1: 2.0}, "c": {0: math.nan}}}
    assert comparisons.compare_values(values, [("b", "a"), ("c", "a"), ("d", "a")]) == []


def test_sign_flips_stand_beside_from_six_seeds_on() -> None:
    values = {"knn_final": {"a": dict.fromkeys(range(6), 1.0), "b": dict.fromkeys(range(6), 2.0)}}
    [six] = comparisons.compare_values(values, [("b", "a")])
    assert six.sign_flip_p == 2 / 64
    values["knn_final"]["b"].pop(0)
    [five] = comparisons.compare_values(values, [("b", "a")])
    assert math.isnan(five.sign_flip_p)


def test_twins_are_compared_as_well_and_each_pair_once(study_folder: Path) -> None:
    arms = read_study(study_folder).arms
    pairs = comparisons.list_pairs(arms)
    assert ("AdamW, lr 0.002, frozen", "AdamW, lr 0.002") in pairs
    assert pairs.count(("AdamW, lr 0.001, frozen", "AdamW, lr 0.001")) == 1
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == len(arms)
    found = comparisons.compare_arms(arms)
    sentences = comparisons.list_findings(arms, found)
    twin = next(line for line in sentences if line.startswith("AdamW, lr 0.001, frozen "))
    assert "it has 2.0 fewer loss jumps a run than AdamW, lr 0.001 (95 % interval" in twin
    assert "cannot be told at 2 seeds" in twin and "every seed" not in " ".join(sentences)
    assert "one seed: cannot be told" in next(s for s in sentences if s.startswith("LAMB"))
    rows = comparisons.tabulate_comparisons(found)
    assert all(tuple(row) == comparisons.COLUMNS for row in rows)
    assert [tuple(row) for row in comparisons.tabulate_comparisons([])] == [comparisons.COLUMNS]


def test_one_arm_has_a_sentence_for_each_run_by_its_name() -> None:
    runs = [judged_run("all runs", seed, 40.0) for seed in (0, 1)]
    assert comparisons.list_findings({"all runs": runs}, []) == [
        f"all runs_seed-{seed}: {JUDGEMENT.why}" for seed in (0, 1)
    ]


def test_arms_without_a_seed_in_common_are_not_compared_and_it_is_said() -> None:
    arms = {"a": [judged_run("a", 0, 40.0)], "b": [judged_run("b", 1, 50.0)]}
    [sentence] = comparisons.list_findings(arms, comparisons.compare_arms(arms))
    assert "no two have a run of one seed in common" in sentence


def test_equal_numbers_are_neither_more_nor_fewer() -> None:
    values = {"jumps": {"a": {0: 3.0, 1: 5.0, 2: 4.0}, "b": {0: 3.02, 1: 4.98, 2: 4.01}}}
    [same] = comparisons.compare_values(values, [("b", "a")])
    text = same.describe()
    assert text.startswith("has the same number of loss jumps a run as a, to a decimal (95 %")
    assert "-0.0" not in text and "more" not in text
    worst = {"knn_final": {"a": {0: 3.0, 1: 3.0}, "b": {0: 3.2, 1: 3.3}}}
    [above] = comparisons.compare_values(worst, [("b", "a")])
    narrow = dataclasses.replace(above, interval=(-0.03, 0.4))
    assert "interval 0.0 to 0.4" in narrow.describe()


def test_a_run_that_diverged_before_its_first_evaluation_guesses_and_decides() -> None:
    lost = judged_run("wild", 1, 40.0, upto=12, stopped=True)
    none = np.empty(0, np.int64)
    lost = dataclasses.replace(
        lost,
        series=dataclasses.replace(lost.series, knn_steps_K=none, knn_K=none.astype(float)),
        judgement=dataclasses.replace(lost.judgement, final_knn=math.nan),
    )
    arms = {
        "calm": [judged_run("calm", seed, 40.0) for seed in (0, 1)],
        "wild": [judged_run("wild", 0, 40.0), lost],
    }
    assert comparisons.measure_arms(arms)["knn_final"]["wild"] == {0: 40.0, 1: 10.0}
    [_, row] = tabulate_arms(arms)
    assert (row["knn_final"], row["knn_final_min"]) == (25.0, 10.0)
    assert "counts as guessing (10.0 %)" in line_up(arms).notes[0]
    asked = PlannedComparison("Is it as good?", "knn_final", "calm", ("wild",))
    [answer] = comparisons.list_answers(comparisons.compare_planned(arms, [asked], 2), 2)
    assert "Not decided" not in answer.summary
    unknown = dataclasses.replace(
        lost, series=dataclasses.replace(lost.series, knn_chance=0.0)
    )  # what guessing gives is not known
    assert not unknown.has_no_network


def test_a_question_that_is_not_decided_tells_nothing_in_the_table() -> None:
    arms = {
        arm: [judged_run(arm, s, at + s) for s in range(3)] for arm, at in (("a", 30), ("b", 50))
    }
    asked = PlannedComparison("Is b better?", "knn_final", "a", ("b",))
    for seeds, told in ((3, True), (4, False)):
        found = comparisons.compare_planned(arms, [asked], seeds)
        [answer] = comparisons.list_answers(found, seeds)
        [row] = comparisons.tabulate_comparisons(found[0][1])
        assert row["told"] is told and ("Not decided yet" in answer.summary) is not told


def test_a_run_that_lost_its_network_counts_as_guessing() -> None:
    arms = {
        "calm": [judged_run("calm", seed, 40.0) for seed in (0, 1)],
        "wild": [
            judged_run("wild", 0, 40.0),
            judged_run("wild", 1, 50.0, upto=150, stopped=True),
        ],
    }
    assert comparisons.measure_arms(arms)["knn_final"]["wild"] == {0: 40.0, 1: 10.0}


def test_what_more_seeds_would_show_is_said() -> None:
    found = comparisons.compare_values(PILOT, [("trained", "frozen"), ("short", "frozen")])
    [correction, plan] = comparisons.describe_correction(found)
    assert "Holm's over the 2 comparisons of this page" in correction
    middle = median(one.sd for one in found)
    page, alone = (
        ", ".join(f"{paired.smallest_difference(middle, n, of):.1f}" for n in (3, 5, 8, 12))
        for of in (2, 1)
    )
    assert f"With 3, 5, 8, 12 seeds a page like this tells differences of {page} points" in plan
    assert plan.endswith(f"one comparison alone, of {alone} points.")
    one_seed = {"knn_final": {"a": {0: 1.0}, "b": {0: 2.0}}}
    assert comparisons.describe_correction(comparisons.compare_values(one_seed, [("b", "a")])) == []
