"""Series of another program's log: which step a value belongs to, and which of several counts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.logs.foreign import last_of_each_step, read_foreign_run
from mocov3_ds.stability.logs.table import LoggedTable, rows_as_columns
from mocov3_ds.stability.same_step import cut_series, has_ended
from mocov3_ds.stability.verdict import judge


def make_table(*rows: dict[str, Any]) -> LoggedTable:
    columns, count = rows_as_columns(rows)
    return LoggedTable("mine", Path("mine.csv"), columns, count)


def test_columns_become_series() -> None:
    rows: list[dict[str, Any]] = [
        {"step": s, "epoch": s / 4, "loss": 5 - s, "lr": 0.1, "grad_norm": 2.0} for s in (1, 2, 3)
    ]
    rows.insert(2, {"step": 2, "val/acc": 0.125})  # a row of its own, as Lightning writes it
    run = read_foreign_run(make_table(*rows), probes=500)
    series = run.series
    assert series.steps_T.tolist() == [1, 2, 3] and series.loss_T.tolist() == [4, 3, 2]
    assert series.knn_steps_K.tolist() == [2] and series.knn_K.tolist() == [12.5]
    assert series.groups == ("whole network",) and series.grad_linf_GT.tolist() == [[2, 2, 2]]
    assert series.epochs_per_step == 0.25 and series.total_steps == 3 and series.probes == 500
    assert run.understood == (
        "mine: 4 rows; step = step, epoch = epoch, loss = loss, lr = lr, knn = val/acc, "
        "grad_norm = grad_norm; val/acc is never above 1, so it is a share of 1."
    )


def test_of_a_resumed_log_the_last_values_count() -> None:
    first = [{"step": s, "loss": 10.0 + s} for s in range(1, 41)]
    again = [{"step": s, "loss": 20.0 + s} for s in range(31, 36)]
    run = read_foreign_run(make_table(*first, *again))
    assert run.series.steps_T.tolist() == list(range(1, 36))
    assert run.series.loss_T[29:].tolist() == [40, 51, 52, 53, 54, 55]
    assert "10 values of steps that were logged again are replaced by the last" in run.understood


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_of_the_last_value_in_words(seed: int) -> None:
    steps = np.random.default_rng(seed).integers(0, 12, 40)
    plain = [i for i, step in enumerate(steps) if all(step < later for later in steps[i + 1 :])]
    assert last_of_each_step(steps).tolist() == plain
    assert last_of_each_step(steps[:0]).tolist() == []


def test_a_log_that_runs_backwards_is_sorted() -> None:
    run = read_foreign_run(make_table(*({"step": s, "loss": s} for s in (4, 3, 2, 1))))
    assert run.series.loss_T.tolist() == [1, 2, 3, 4]


def test_steps_of_epochs_and_of_rows() -> None:
    by_epoch = read_foreign_run(make_table(*({"epoch": e, "train_loss": e} for e in (0, 1, 2))))
    assert by_epoch.series.steps_T.tolist() == [0, 1, 2] and by_epoch.series.epochs_per_step == 1
    assert "no step, so steps are those of epoch" in by_epoch.understood
    by_row = read_foreign_run(make_table({"loss": 3}, {"loss": math.nan}))
    assert by_row.series.steps_T.tolist() == [1, 2] and math.isnan(by_row.series.loss_T[1])
    assert "no step, so rows are numbered" in by_row.understood


def test_accuracy_alone_and_rows_without_a_step() -> None:
    rows = [{"step": s, "acc": 10.0 + s} for s in (10, 20)]
    run = read_foreign_run(make_table(*rows, {"acc": 99}))
    assert run.series.knn_K.tolist() == [20, 30] and run.series.steps_T.tolist() == [10, 20]
    assert "1 row without a step left out" in run.understood
    assert "acc counts as that of held-out images" in run.understood


def test_layers_named_by_hand() -> None:
    rows = [{"step": s, "loss": 1.0, "g/a": s, "g/b": 2 * s} for s in (1, 2)]
    given = ["grad.patch_embed=g/a", "grad.block_11=g/b"]
    series = read_foreign_run(make_table(*rows), given).series
    assert series.groups == ("patch_embed", "block_11")
    assert series.gradient_of("block_11").tolist() == [2, 4]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"step": 1.5, "loss": 1}], "column step holds steps that are no whole numbers"),
        ([{"step": 1e300, "loss": 1}], "column step holds steps that are no whole numbers"),
        ([{"step": 1, "speed": 1}], "neither a loss nor an accuracy .* there are step, speed"),
        ([{"step": 1, "a/loss": 1, "b/loss": 1}], "mine.csv, run mine: 2 columns may be the tr"),
        ([{"step": -1, "loss": 1}], "run mine: loss = loss has no value at a step that counts"),
        ([{"Wall time": 9, "Step": 1, "Value": 1}], "run mine: Value is one scalar .*RUN-tag-SCAL"),
    ],
)
def test_what_cannot_be_understood(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_foreign_run(make_table(*rows))


def test_a_log_without_our_numbers_is_judged() -> None:
    """No chance level, no layers, no probes: events of the loss and dips are still found."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, 2001):
        loss = 3 * np.exp(-step / 400) + 1 + 0.005 * random.standard_normal()
        rows.append({"step": step, "loss": loss * (1.5 if 1000 <= step < 1010 else 1)})
        if step % 20 == 0:
            dip = 8 if 1000 <= step <= 1200 else 0
            rows[-1]["knn"] = 50 - 30 * np.exp(-step / 300) - dip + 0.2 * random.standard_normal()
    judgement = judge(read_foreign_run(make_table(*rows)).series)
    assert judgement.verdict == "UNSTABLE"
    assert any(900 <= dip.first <= 1020 for dip in judgement.dips)
    assert any(abs(event.peak - 1004) <= 6 for event in judgement.loss_events)


def quiet_rows(count: int = 60) -> list[dict[str, Any]]:
    """Rows of a loss that falls, a gradient, and in every second one an accuracy that rises."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        row = {"step": step, "loss": 5 - step / count, "grad_norm": 1 + 0.1 * random.random()}
        if step % 2 == 0:
            row["knn"] = 20 + 20 * step / count + 0.3 * random.standard_normal()
        rows.append(row)
    return rows


def test_a_log_without_a_loss_did_not_diverge() -> None:
    rows = [{"step": row["step"], "knn": row["knn"]} for row in quiet_rows() if "knn" in row]
    series = read_foreign_run(make_table(*rows)).series
    judgement = judge(series)
    assert not series.has_loss
    assert judgement.verdict == "NOT LOOKED"
    assert judgement.why == "nothing was found, but no loss event was looked for: no loss is logged"
    assert not any("finite" in note for note in judgement.notes)
    fallen = [{**row, "knn": 1.0} if row["step"] > 30 else row for row in rows]
    verdict = judge(read_foreign_run(make_table(*fallen)).series)
    assert verdict.verdict == "DIVERGED" and "ended at 1.0 %" in verdict.why


def test_losses_of_nan_at_the_evaluations_are_gaps() -> None:
    rows = [{**row, "loss": math.nan} if "knn" in row else row for row in quiet_rows(120)]
    run = read_foreign_run(make_table(*rows))
    assert judge(run.series).verdict == "STABLE"
    assert "60 losses that are nan where none was logged" in run.understood
    two_rows = [
        part for row in quiet_rows(120) for part in (row, {"step": row["step"], "loss": math.nan})
    ]
    assert np.isfinite(read_foreign_run(make_table(*two_rows)).series.loss_T).all()


@pytest.mark.parametrize("column", ["grad_norm", "knn"])
def test_a_gradient_or_accuracy_that_ends_in_nan_diverged(column: str) -> None:
    rows = quiet_rows(120)
    for row in rows[80:]:
        if column in row:
            row[column] = math.nan
    judgement = judge(read_foreign_run(make_table(*rows)).series)
    assert judgement.verdict == "DIVERGED"
    assert judgement.why.startswith(f"{column} was not finite from step 8")


def test_an_evaluation_before_training_is_the_random_network() -> None:
    begun = read_foreign_run(make_table({"step": 0, "knn": 28.0}, *quiet_rows()))
    assert begun.series.random_knn == 28.0
    with_loss = make_table({"step": 0, "knn": 28.0, "loss": 5.1}, *quiet_rows())
    assert read_foreign_run(with_loss).series.random_knn is None  # after the first epoch, say
    assert read_foreign_run(make_table(*quiet_rows())).series.random_knn is None


def test_held_negative_and_impossible_accuracies() -> None:
    rows = quiet_rows(120)
    value = 20.0
    for row in rows:
        value = row["knn"] = row.get("knn", value) if row["step"] % 6 == 0 else value
    held = read_foreign_run(make_table(*rows))
    assert len(held.series.knn_K) == 21
    assert "99 values of knn repeat the evaluation before and do not count" in held.understood
    none = read_foreign_run(make_table({"step": 0, "knn": -1}, *quiet_rows()))
    assert len(none.series.knn_K) == 30
    assert "1 value of knn below 0 is left out as no evaluation" in none.understood
    with pytest.raises(ValueError, match=r"mine.csv, run mine: knn reaches 150, which is no acc"):
        read_foreign_run(make_table({"step": 0, "knn": 150.0}, *quiet_rows()))


def test_a_column_without_a_number_is_named() -> None:
    table = replace(make_table({"step": 1}, {"step": 2}), empty=["note", "train/loss"])
    with pytest.raises(ValueError, match=r"run mine: column train/loss holds no number, so there"):
        read_foreign_run(table)


@pytest.mark.parametrize(
    ("rows", "last_loss"),
    [
        ([{"step": s, "loss": 5 - s / 100} for s in range(7, 401, 7)], 399),
        ([{"step": s, "loss": 5 - s / 100} for s in range(400) if (s + 1) % 10], 398),
    ],
)
def test_a_log_whose_last_row_is_an_evaluation_has_ended(
    rows: list[dict[str, Any]], last_loss: int
) -> None:
    """A loss every 7 steps and an evaluation every 10; Lightning's rows, each of one of them."""
    shift = 0 if last_loss == 399 else 1
    evaluated: list[dict[str, Any]] = [
        {"step": s - shift, "knn": 10 + s / 10} for s in range(10, 401, 10)
    ]
    table = make_table(*sorted(rows + evaluated, key=lambda row: row["step"]))
    series = read_foreign_run(table).series
    assert has_ended(series) and series.steps_T[-1] == last_loss
    assert series.knn_K[-1] == 50 and cut_series(series, series.total_steps) is series
    assert not any(note.startswith("judged after") for note in judge(series).notes)


@pytest.mark.parametrize(
    ("facts", "ended", "words"),
    [
        ({"total_steps": 1000}, False, "its length is that of its total_steps, 1,000 steps"),
        ({"train": {"max_steps": 60}}, True, "its length is that of its max_steps, 60 steps"),
        ({"steps": 61}, True, "its length is that of its steps, 61 steps"),  # counted from 0
        ({"steps": 5}, True, "its steps (5 steps) is below its last step and does not count"),
        ({"max_steps": -1, "a": {"steps": 70}, "b": {"steps": 90}}, True, "60 rows"),
        ({"epochs": 30}, False, "its length is that of its epochs, 120 steps"),
    ],
)
def test_settings_tell_a_length(facts: dict[str, Any], ended: bool, words: str) -> None:
    rows = [{**row, "epoch": row["step"] / 4} for row in quiet_rows()]
    run = read_foreign_run(replace(make_table(*rows), facts=facts))
    assert has_ended(run.series) == ended and words in run.understood
    assert run.is_planned == ("its length" in run.understood)
