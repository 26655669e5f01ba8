"""Values of a JSON: what is off, how a value is shown."""

from typing import Any

import pytest

from mocov3_ds.distributed.engine_values import (
    is_off,
    number,
    read_parameter,
    show_value,
    whole,
)


@pytest.mark.parametrize(
    ("value", "off"),
    [
        *(
            (value, True)
            for value in (None, False, "", "auto", "False", [], {}, {"enabled": "false"})
        ),
        ({"a": False, "b": None}, True),
        ({"enabled": False, "job_name": "x"}, True),
        *((value, False) for value in (True, 1, "x", [1], {"enabled": True}, {"a": 1})),
    ],
)
def test_off(value: Any, off: bool) -> None:
    assert is_off(value) == off


def test_values_are_shown_on_one_line() -> None:
    assert show_value({"a": "x\ny"}) == '{"a": "x\\ny"}'
    assert len(show_value("x" * 1000)) == 60


def test_bounds_are_included() -> None:
    assert whole(1, 3)("x", 3.0) == 3
    assert number(0.5)("x", "0.5") == 0.5
    for value in (0, 4, 1.5, "", "1.x", "0x10"):
        with pytest.raises(ValueError, match=r"x is .* it must be a whole number 1 to 3"):
            whole(1, 3)("x", value)


def test_auto_is_refused_where_the_value_is_a_number_alone() -> None:
    for key in ("ns_dtype", "backend"):
        assert read_parameter(f"optimizer.params.{key}", "auto") == "auto"
    for key in ("lr", "betas", "betas[0]", "eps", "weight_decay"):
        with pytest.raises(ValueError, match="only the Trainer of transformers fills that in"):
            read_parameter(f"optimizer.params.{key}", "auto")
