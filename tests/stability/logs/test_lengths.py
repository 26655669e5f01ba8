"""How long a run was to be, and whether it has come to its end."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.findings import Series
from mocov3_ds.stability.logs.lengths import find_length, has_come_to, total_of
from tests.stability.synthetic import healthy


def of_steps(loss: range, evaluations: range) -> Series:
    series = healthy(0, 2 * len(loss)).series
    return replace(
        series,
        steps_T=np.array(loss),
        loss_T=series.loss_T[: len(loss)],
        lr_T=series.lr_T[: len(loss)],
        knn_steps_K=np.array(evaluations, np.int64),
        knn_K=np.full(len(evaluations), 50.0),
    )


@pytest.mark.parametrize(
    ("facts", "unit", "length"),
    [
        ({"total_steps": 100, "steps": 7}, "step", (100, "total_steps")),
        ({"optim": {"max_steps": 100}}, "step", (100, "max_steps")),
        ({"a": {"steps": 5}, "b": {"steps": 6}}, "step", (0, "")),
        ({"max_steps": -1, "epochs": 3}, "step", (30, "epochs")),
        ({"max_steps": True, "steps": "90"}, "step", (0, "")),
        ({"epochs": 3, "steps": 90}, "epoch", (3, "epochs")),
        ({"epochs": 3, "steps": 90}, "row", (0, "")),
    ],
)
def test_settings_that_tell_a_length(
    facts: dict[str, Any], unit: str, length: tuple[int, str]
) -> None:
    assert find_length(facts, unit, 0.1) == length
    if unit == "step" and "epochs" in facts:
        assert find_length(facts, unit, math.nan) == (0, "")


def test_an_end_within_one_logging_interval() -> None:
    series = of_steps(range(0, 1000, 50), range(100, 901, 100))  # the last loss is at 950
    assert has_come_to(series, 1000) and not has_come_to(series, 1001)
    assert total_of(series, 1000) == (950, True) == total_of(series, 0)
    assert total_of(series, 2000) == (2000, False)
    evaluated = of_steps(range(7, 1000, 7), range(10, 1001, 10))
    assert total_of(evaluated, 1000) == (994, True)


def test_losses_that_end_long_before_the_evaluations() -> None:
    assert total_of(of_steps(range(1, 501), range(10, 1001, 10)), 0) == (1000, True)
