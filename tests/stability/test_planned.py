"""Comparisons that a grid plans: read, refused, kept in its folder, and alone on its page."""

import dataclasses
import json
from pathlib import Path

import pytest

from mocov3_ds.stability import comparisons, planned, study_page
from mocov3_ds.stability.comparable_runs import line_up
from mocov3_ds.stability.grid import lay_out, tomllib
from mocov3_ds.stability.grid_folder import prepare_folder
from mocov3_ds.stability.planned import PlannedComparison
from mocov3_ds.stability.study import JudgedRun, Study
from tests.stability.judged_runs import judged_run

GRID = """
twins = false
seeds = 3
[[arms]]
name = "one"
[[arms]]
name = "other"
beta2 = 0.95
[[arms]]
name = "third"
beta2 = 0.9
[[comparisons]]
question = "Is one better?"
reference = "one"
[[comparisons]]
question = "Are there jumps?"
metric = "jumps"
reference = "other"
arms = ["third"]
"""


def test_a_grid_plans_its_comparisons() -> None:
    grid = lay_out(tomllib.loads(GRID), "mine", "tiny")
    assert grid.planned == (
        PlannedComparison("Is one better?", "knn_final", "one", ("other", "third")),
        PlannedComparison("Are there jumps?", "jumps", "other", ("third",)),
    )
    trees = json.loads(json.dumps(planned.as_trees(grid.planned)))
    assert planned.read_planned(trees, ["one", "other", "third"]) == grid.planned
    assert {*planned.METRICS} == {*comparisons.METRICS}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("reference = \"one\"", "reference = \"on\""), "among reference and arms, has an unknown"),
        (("metric = \"jumps\"", "metric = \"jump\""), "metric has an unknown key 'jump' (did you"),
        (("question = \"Is one better?\"", ""), "comparison 1 needs a question and a reference"),
        (("arms = [\"third\"]", "arms = []"), "comparison 2 has arms = []; it is a list of labels"),
        (("arms = [\"third\"]", "arms = [\"other\"]"), "compares an arm with itself, or twice"),
        (("arms = [\"third\"]", "arm = 1"), "comparison 2 has an unknown key 'arm'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(change: tuple[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^mine: ") as error:
        lay_out(tomllib.loads(GRID.replace(*change)), "mine", "tiny")
    assert sentence in str(error.value)


def test_each_question_is_a_family_of_its_own() -> None:
    knn = {"one": [30.0, 31, 32], "other": [32.1, 33, 34.2], "third": [30.1, 31.2, 31.9]}
    arms = {
        arm: [judged_run(arm, seed, value) for seed, value in enumerate(values)]
        for arm, values in knn.items()
    }
    first = PlannedComparison("Is one better?", "knn_final", "one", ("other", "third"))
    second = PlannedComparison("Alone?", "knn_final", "one", ("other",))
    answers = comparisons.compare_planned(arms, [first, second])
    [together, _], [alone] = (found for _, found in answers)
    assert together.holm_p == pytest.approx(2 * alone.p) == pytest.approx(2 * alone.holm_p)
    both, more = comparisons.list_answers(answers, 3)
    assert (both.question, more.question) == ("Is one better?", "Alone?")
    assert both.basis == "k-NN final; 2 comparisons, planned before the runs"
    assert both.summary == (
        "Told: other is 2.1 points above one. 1 other cannot be told from one at 3 seeds."
    )
    assert more.summary == "Told: other is 2.1 points above one."
    first_arm, second_arm = both.details
    assert first_arm.startswith("other is 2.1 points above one (95 %")
    assert second_arm.startswith("third is 0.1 points above one") and second_arm.endswith(").")
    assert comparisons.list_answers(answers, 4)[0].summary == (
        "Not decided yet: 3 of 4 seeds have ended in all of its arms."
    )
    del arms["third"]
    answers = comparisons.compare_planned(line_up(arms).arms, [first])
    assert "0 of 3 seeds" in comparisons.list_answers(answers, 3)[0].summary


def test_accuracy_by_a_bank_of_its_own_is_a_metric() -> None:
    def run(arm: str, seed: int, full: float | None, *, stopped: bool = False) -> JudgedRun:
        one = judged_run(arm, seed, 30.0, stopped=stopped)
        return dataclasses.replace(one, series=dataclasses.replace(one.series, knn_at_end=full))

    arms = {
        "a": [run("a", 0, 40.0), run("a", 1, 41.0), run("a", 2, None)],
        "b": [run("b", 0, 43.0), run("b", 1, None, stopped=True), run("b", 2, 50.0)],
    }
    one = PlannedComparison("Is b better?", "knn_full", "a", ("b",))
    [(_, [found])] = comparisons.compare_planned(arms, [one])
    assert found.seeds == (0, 1)  # one has no such value, one has no network any more: it guesses
    assert found.difference == pytest.approx((3 + (10 - 41)) / 2)
    assert found.describe().startswith("ends 14.0 points below a")


def test_a_page_tests_the_planned_ones_and_no_others(tmp_path: Path) -> None:
    arms = {
        arm: [judged_run(arm, seed, 30.0 + seed + index) for seed in range(3)]
        for index, arm in enumerate("abc")
    }
    study = Study("title", "", "tiny", "", arms, (), seeds=3)
    compared = study_page.compare_study(study, arms)
    assert len(compared.comparisons) == 6 and not compared.answers
    assert compared.sentences[0].startswith("b is 1.0 points above a")
    one = PlannedComparison("Is c better than b?", "knn_final", "b", ("c",))
    study = dataclasses.replace(study, planned=(one,))
    compared = study_page.compare_study(study, arms)
    [only] = compared.comparisons
    assert (only.arm, only.reference, only.metric) == ("c", "b", "knn_final")
    [answer] = compared.answers
    assert answer.question == "Is c better than b?" and answer.details[0].startswith("c is 1.0")
    assert not compared.sentences
    assert "planned" in compared.notes[0]
    pictures = study_page.draw_pictures(arms, compared, tmp_path)
    assert pictures[0].title == "What was planned" and (tmp_path / "planned.png").exists()


def test_the_folder_keeps_them(tmp_path: Path) -> None:
    grid = lay_out(tomllib.loads(GRID), "mine", "tiny")
    prepare_folder(tmp_path, grid, launcher="python", extra=[])
    tree = json.loads((tmp_path / "grid.json").read_text())
    assert planned.read_planned(tree["comparisons"], ["one", "other", "third"]) == grid.planned
