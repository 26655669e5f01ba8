"""Lengths of runs that no setting tells: the longest run of the page does, and it is said."""

from dataclasses import replace

import numpy as np

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.run_lengths import RunLength, settle_lengths
from mocov3_ds.stability.same_step import has_ended
from tests.stability.synthetic import healthy


def log_of(name: str, steps: int, unit: str = "step", *, is_planned: bool = False) -> RunLength:
    return RunLength(name, healthy(0, steps).series, unit, is_planned)


def test_the_longest_run_tells_and_is_named() -> None:
    settled, [note] = settle_lengths([log_of("a", 1000), log_of("b", 400), log_of("c", 995)])
    assert {name: series.total_steps for name, series in settled.items()} == {
        "a": 1000, "b": 1000, "c": 995,
    }  # fmt: skip
    assert has_ended(settled["c"]) and not has_ended(settled["b"])  # c is of the same length
    assert note.startswith(
        "Nothing beside this log tells how long the run was to be: b (400 steps). So the longest "
        "run of the page, a (1,000 steps), tells, and what is shorter counts as unfinished."
    )


def test_known_lengths_stay() -> None:
    runs = [log_of("a", 1000, is_planned=True), log_of("b", 400, is_planned=True)]
    settled, notes = settle_lengths([*runs, log_of("c", 1000)])
    assert all(settled[run.name] is run.series for run in runs)
    assert notes == [
        "Runs of different lengths that have ended are compared at their ends: a (1,000 steps), b "
        "(400 steps), c (1,000 steps)."
    ]


def test_steps_are_not_compared_with_epochs() -> None:
    settled, notes = settle_lengths([log_of("a", 1000), log_of("b", 40, "epoch")])
    assert all(has_ended(series) for series in settled.values())
    assert notes == [
        "The logs count different things (steps: a; epochs: b), so their lengths are not compared, "
        "and runs that have ended are compared at their ends."
    ]


def lost(series: Series, chance: float) -> Series:
    loss_T = series.loss_T.copy()
    loss_T[-3:] = np.nan
    return replace(series, loss_T=loss_T, knn_chance=chance)


def test_a_run_whose_loss_ends_in_nan_has_ended_where_guessing_is_known() -> None:
    for chance, ended in ((10.0, True), (0.0, False)):
        short = log_of("b", 400)
        short = replace(short, series=lost(short.series, chance))
        settled, _ = settle_lengths([log_of("a", 1000), short])
        assert has_ended(settled["b"]) == ended
