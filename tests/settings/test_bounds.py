"""Bounds of numbers: the ends, what is no number, the sentence."""

from dataclasses import dataclass, field

import pytest

from mocov3_ds.settings.bounds import Bounds, Coefficient, PositiveCount, check_bounds


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "allowed"),
    [
        (Bounds(1), 1, 0, "must be 1 or more"),
        (Bounds(0, 1), 1, 1.5, "must be 0 to 1"),
        (Bounds(0, 255), 0, -1, "must be 0 to 255"),
        (Bounds(0, exclusive=True), 0.1, 0, "must be above 0"),
        (Bounds(0, exclusive=True), 0.1, float("inf"), "must be a finite number above 0"),
        (Bounds(1), 2**62, 10**400, "is beyond all numbers of 64 bits"),
        (Bounds(0), float("inf"), float("nan"), "must be 0 or more"),
    ],
)
def test_bounds(bounds: Bounds, good: float, bad: float, allowed: str) -> None:
    bounds.check_value("model.depth", good)
    with pytest.raises(ValueError, match=f"--model.depth {bad} cannot be; it {allowed}"):
        bounds.check_value("model.depth", bad)


@dataclass(frozen=True)
class Inner:
    rate: Coefficient = 0.1


@dataclass(frozen=True)
class Outer:
    size: PositiveCount = 1
    free: float = -1.0
    inner: Inner = field(default_factory=Inner)


def test_each_field_of_a_dataclass_is_checked_by_its_flag() -> None:
    check_bounds(Outer())
    for settings, words in (
        (Outer(size=0), "--size 0 cannot be; it must be 1 or more"),
        (Outer(inner=Inner(rate=float("inf"))), "--inner.rate inf cannot be; it must be 0 to 1e"),
    ):
        with pytest.raises(ValueError, match=words):
            check_bounds(settings)
