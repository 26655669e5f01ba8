"""Gaps of a log's column: nan where nothing was logged is none, nan where training broke is one."""

import numpy as np
import numpy.typing as npt
import pytest

from mocov3_ds.stability.logs.gaps import ends_at, flag_gaps, flag_held_over, flag_replaced_gaps

NAN = np.nan
STEPS = np.arange(100)
NOTHING = np.empty(0, np.int64)


def losses(*broken: int) -> npt.NDArray[np.float64]:
    values = np.linspace(5.0, 3.0, 100)
    values[list(broken)] = NAN
    return values


def test_nan_beside_a_finite_value_of_the_same_step_is_a_gap() -> None:
    steps = np.array([1, 2, 2, 3, 3])
    values = np.array([1.0, NAN, 2.0, NAN, np.inf])
    assert flag_replaced_gaps(steps, values).tolist() == [False, True, False, False, False]


def test_nan_in_most_rows_is_how_the_log_was_written() -> None:
    rare = losses(*[step for step in range(100) if step % 10])
    assert np.array_equal(flag_gaps(STEPS, rare, NOTHING), np.isnan(rare))


def test_nan_at_the_evaluations_and_nowhere_else_is_a_gap() -> None:
    evaluated = np.arange(0, 100, 20)
    assert flag_gaps(STEPS, losses(*evaluated), evaluated).sum() == 5
    assert flag_gaps(STEPS, losses(*evaluated, 33), evaluated).sum() == 0
    assert flag_gaps(STEPS, losses(20, 40), evaluated).sum() == 0  # of five evaluations


@pytest.mark.parametrize("broken", [(50,), (50, 51, 52), tuple(range(60, 100))])
def test_nan_among_finite_losses_or_to_the_end_is_none(broken: tuple[int, ...]) -> None:
    assert flag_gaps(STEPS, losses(*broken), NOTHING).sum() == 0


def test_a_column_of_nan_alone_has_no_gaps() -> None:
    assert flag_gaps(STEPS, np.full(100, NAN), NOTHING).sum() == 0


def test_gaps_inside_leave_a_broken_end() -> None:
    values = losses(*[step for step in range(80) if step % 2], *range(80, 100))
    flagged = flag_gaps(STEPS, values, NOTHING)
    assert flagged.sum() == 40 - 1 and not flagged[79:].any()


def test_where_a_column_ends() -> None:
    assert ends_at(losses()) is None
    assert ends_at(losses(*range(70, 100))) == 70
    assert ends_at(losses(*range(96, 100))) is None  # four values
    assert ends_at(losses(*[step for step in range(100) if step % 25])) is None  # the pace of it
    assert ends_at(np.full(9, NAN)) is None


def test_accuracies_that_are_held_until_the_next() -> None:
    evaluations = np.random.default_rng(0).normal(40, 1, 12)
    held = np.repeat(evaluations, 7)[3:]  # the log begins between two evaluations
    flagged = flag_held_over(held)
    assert held[~flagged].tolist() == evaluations.tolist()
    twice_equal = np.repeat(evaluations[[0, 1, 1, 2, 3, 4, 5]], 7)
    assert (~flag_held_over(twice_equal)).sum() == 6


def test_equal_evaluations_by_chance_are_not_held() -> None:
    rounded = np.round(np.random.default_rng(0).normal(40, 0.1, 300), 1)
    assert np.mean(rounded[1:] == rounded[:-1]) > 0.2
    for values in (rounded, np.full(50, 10.0), np.array([]), np.array([1.0])):
        assert not flag_held_over(values).any()
