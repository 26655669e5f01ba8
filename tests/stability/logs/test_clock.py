"""A counter that starts anew with each epoch is counted on, or refused where nothing tells."""

from typing import Any

import pytest

from mocov3_ds.stability.logs.foreign import read_foreign_run
from tests.stability.logs.test_foreign import make_table


def test_a_counter_that_starts_anew_is_counted_on() -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": e, "iter": i, "loss": 9 - e - i / 100}
        for e in range(1, 5)
        for i in range(0, 100, 10)
    ]
    rows.insert(20, {"epoch": 2, "knn": 30.0})  # at the end of the second epoch, without an iter
    run = read_foreign_run(make_table(*rows))
    assert run.series.steps_T.tolist() == list(range(0, 400, 10))
    assert run.series.loss_T.tolist() == [row["loss"] for row in rows if "loss" in row]
    assert run.series.knn_steps_K.tolist() == [190]
    assert run.series.epochs_per_step == 0.01
    assert "iter starts anew with each epoch, so steps are counted on, 100 an epoch" in (
        run.understood
    )
    resumed = make_table(*rows[:35], *rows[31:])  # in the middle of the last epoch
    assert read_foreign_run(resumed).series.loss_T.tolist() == run.series.loss_T.tolist()


def test_a_counter_that_starts_anew_without_epochs_is_refused() -> None:
    rows = [{"iter": i, "turn": e, "loss": 9 - e} for e in range(4) for i in range(100)]
    with pytest.raises(
        ValueError, match=r"iter starts anew 3 times after 99.*there are iter, turn"
    ):
        read_foreign_run(make_table(*rows))
    assert len(read_foreign_run(make_table(*rows), ["epoch=turn"]).series.loss_T) == 400
    assert len(read_foreign_run(make_table(*rows), ["step="]).series.loss_T) == 400
    resumed = [{"iter": i, "loss": 9} for stop in (30, 50, 100) for i in range(stop)]
    assert len(read_foreign_run(make_table(*resumed)).series.loss_T) == 100
