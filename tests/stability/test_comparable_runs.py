"""Unfinished runs are named, and left out or compared at the step that all have reached."""

from dataclasses import replace

from mocov3_ds.stability.comparable_runs import LinedUp, line_up
from mocov3_ds.stability.comparisons import compare_arms
from mocov3_ds.stability.study import Arms
from mocov3_ds.stability.study_tables import tabulate_arms
from tests.stability.judged_runs import STEPS, judged_run


def study(**unfinished: int) -> Arms:
    """Two arms of three seeds; `b1=137` is seed 1 of arm b at step 137."""
    return {
        arm: [
            judged_run(arm, seed, 40.0 + seed, upto=unfinished.get(f"{arm}{seed}", STEPS))
            for seed in range(3)
        ]
        for arm in "ab"
    }


def seeds(found: LinedUp) -> dict[str, list[int]]:
    return {label: [run.cell.seed for run in runs] for label, runs in found.arms.items()}


def last_steps(found: LinedUp) -> set[int]:
    return {int(run.series.steps_T[-1]) for runs in found.arms.values() for run in runs}


def test_ended_runs_are_compared_as_they_are() -> None:
    arms = study()
    assert line_up(arms) == LinedUp(arms, ())


def test_an_unfinished_run_is_left_out_where_two_seeds_have_ended() -> None:
    found = line_up(study(b1=137))
    assert seeds(found) == {"a": [0, 1, 2], "b": [0, 2]}
    [note] = found.notes
    assert note == (
        "Unfinished, so left out of the arms' numbers and of comparisons: b_seed-1 (step 137 of "
        "200)."
    )
    assert {one.seeds for one in compare_arms(found.arms)} == {(0, 2)}
    arms = study(b1=137)
    row = tabulate_arms(arms, found.arms)[1]
    assert (row["seeds"], row["left_out"], row["knn_final"]) == (2, 1, 41.0)


def test_else_all_runs_are_compared_at_the_last_common_step() -> None:
    """Accuracy doubles at step 100: unfinished runs at step 95 are not worse than ended ones."""
    found = line_up(study(b0=95, b1=120))
    assert seeds(found) == {"a": [0, 1, 2], "b": [0, 1, 2]} and last_steps(found) == {95}
    [note] = found.notes
    assert note == (
        "Unfinished: b_seed-0 (step 95 of 200), b_seed-1 (step 120 of 200). So the arms' numbers "
        "and the comparisons are those after step 95, the last that all of them have reached."
    )
    assert all(one.difference == 0 for one in compare_arms(found.arms) if one.metric == "knn_final")


def test_a_run_that_has_hardly_begun_holds_nobody_back() -> None:
    found = line_up(study(b0=20, b1=120))
    assert seeds(found) == {"a": [0, 1, 2], "b": [1, 2]} and last_steps(found) == {120}
    assert found.notes[0] == (
        "Far behind, so left out of the arms' numbers and of comparisons: b_seed-0 (step 20 of "
        "200)."
    )
    arms = study(b0=20, b1=20, b2=20)
    row = tabulate_arms(arms, line_up(arms).arms)[1]
    assert (row["seeds"], row["left_out"], row["knn_final"], row["E"]) == (0, 3, None, None)


def test_arms_of_other_lengths_are_compared_at_the_same_share() -> None:
    """All of `long` are half way, all of `short` at three quarters."""
    half = [judged_run("long", seed, 40.0) for seed in range(3)]
    arms = {
        "long": [replace(r, series=replace(r.series, total_steps=2 * STEPS)) for r in half],
        "short": [judged_run("short", seed, 40.0, upto=150) for seed in range(3)],
    }
    found = line_up(arms)
    assert last_steps(replace(found, arms={"long": found.arms["long"]})) == {STEPS}
    assert last_steps(replace(found, arms={"short": found.arms["short"]})) == {STEPS // 2}
    assert "those after 50 % of each run's steps" in found.notes[0]


def test_twins_are_cut_alike() -> None:
    arms = {
        "trained": [judged_run("trained", s, 30.0, upto=90, twin="frozen") for s in range(2)],
        "frozen": [judged_run("frozen", s, 40.0) for s in range(2)],
    }
    found = line_up(arms)
    assert [run.judgement.lost_to_twin for run in found.arms["trained"]] == [5.0, 5.0]


def test_a_run_that_lost_its_network_has_ended_and_is_named() -> None:
    arms = study()
    arms = {**arms, "b": [*arms["b"][:2], judged_run("b", 2, 40.0, upto=120, stopped=True)]}
    found = line_up(arms)
    assert seeds(found)["b"] == [0, 1, 2]
    assert found.notes == (
        "b_seed-2 stopped at a value that was not finite: in comparisons its final accuracy counts "
        "as guessing (10.0 %).",
    )
