"""The numbers that a setting may have, beside its field: `batch: PositiveCount = 256`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field may have, from `low` to `high`."""

    low: float
    high: float = math.inf
    exclusive: bool = False
    """the ends themselves are refused"""

    def check_value(self, flag: str, value: float) -> None:
        """Refuse a number outside of the bounds.

        Args:
            flag: name of the setting without its dashes, such as "model.depth".
            value: the number that the user gave.

        Raises:
            ValueError: the number is outside of the bounds, or not a number.
        """
        if isinstance(value, int) and abs(value) > 2**63 and self.high == math.inf:
            raise ValueError(f"--{flag} {value} cannot be; it is beyond all numbers of 64 bits.")
        if self.exclusive and not self.low < value < self.high:
            finite = "a finite number " * (not math.isfinite(value))
            raise ValueError(f"--{flag} {value} cannot be; it must be {finite}above {self.low}.")
        if not self.low <= value <= self.high:
            span = f"{self.low} to {self.high:g}" if self.high < math.inf else f"{self.low} or more"
            raise ValueError(f"--{flag} {value} cannot be; it must be {span}.")


Count = Annotated[int, Bounds(0)]
PositiveCount = Annotated[int, Bounds(1)]
Share = Annotated[float, Bounds(0, 1)]
Seed = Annotated[int, Bounds(-(2**63), 2**63 - 1)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, exclusive=True)]
Coefficient = Annotated[float, Bounds(0, 1e9)]
"""a factor or a number of steps: finite, and not negative"""


def check_bounds(settings: object, prefix: str = "") -> None:
    """Check each number of a dataclass against the `Bounds` of its field.

    Args:
        settings: an instance of a dataclass; inner dataclasses are checked as well.
        prefix: what stands before a field's name in its flag, such as "model.".

    Raises:
        ValueError: a number is outside of its bounds.
    """
    assert dataclasses.is_dataclass(settings)
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{entry.name}.")
        for bounds in getattr(entry.type, "__metadata__", ()):
            if isinstance(bounds, Bounds) and isinstance(value, int | float):
                bounds.check_value(f"{prefix}{entry.name}", value)
