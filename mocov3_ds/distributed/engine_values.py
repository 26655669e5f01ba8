"""What kind of value may a key of a DeepSpeed JSON have? Each reader returns it typed, or refuses.

DeepSpeed reads some values by truth and compares others as they come, so that the text "false"
switches a thing on in one place and off in the next. Here a value is read where it can mean one
thing only: "True" is true, "5e8" and 5e8 are 500000000. Everything else is one sentence.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from mocov3_ds.settings.spelling import did_you_mean

Reader = Callable[[str, Any], Any]
"""takes the dotted name of a key and its value; returns the typed value or raises ValueError"""

_LARGEST = float(2**62)
_DEEPEST = 50
_FILLED_BY_TRANSFORMERS = ("lr", "betas", "eps", "weight_decay")
"""params of an optimizer, all numbers, that its Trainer fills in where they are "auto"; others may
have that value themselves"""


def show_value(value: Any) -> str:
    """A value as JSON writes it, on one line and cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_value(name: str, value: Any, allowed: str) -> ValueError:
    """The error that says what a key has and what it must be.

    Args:
        name: dotted name of the key.
        value: what the user gave.
        allowed: what follows "it must be".
    """
    beginning = f"the DeepSpeed config's {name} is {show_value(value)}"
    if value == "auto":
        remedy = (
            "only the Trainer of transformers fills that in: write the value, or remove the key"
        )
    elif value is None:
        remedy = "remove the key for its default"
    else:
        return ValueError(f"{beginning}; it must be {allowed}.")
    return ValueError(f"{beginning} where it must be {allowed}; {remedy}.")


def read_switch(name: str, value: Any) -> bool:
    """True or false, also as text in any case or as 1 and 0.

    Raises:
        ValueError: it is something else.
    """
    spelling = value.strip().lower() if isinstance(value, str) else value
    if isinstance(spelling, bool):
        return spelling
    if spelling in ("true", "false"):
        return spelling == "true"
    if isinstance(spelling, int) and spelling in (0, 1):
        return bool(spelling)
    raise refuse_value(name, value, "true or false")


def whole(low: int = 0, high: float = _LARGEST) -> Reader:
    """Reader of a whole number from `low` to `high`, also written as 5e8 or as text."""

    def read(name: str, value: Any) -> int:
        number = _parse_number(value)
        if number is None or not low <= number <= high or number != int(number):
            bounded = high < _LARGEST or (number is not None and number > high)
            span = f"{low} to {high:.15g}" if bounded else f"of {low} or more"
            raise refuse_value(name, value, f"a whole number {span}")
        return int(number)

    return read


def number(low: float = 0.0, high: float = math.inf) -> Reader:
    """Reader of a finite number from `low` to `high`, also written as text."""

    def read(name: str, value: Any) -> float:
        parsed = _parse_number(value)
        if parsed is None or not low <= parsed <= high:
            span = f"{low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
            finite = "finite " * (isinstance(value, float) and not math.isfinite(value))
            raise refuse_value(name, value, f"a {finite}number {span}")
        return float(parsed)

    return read


def word(*words: str) -> Reader:
    """Reader of one of a few words, in any case."""

    def read(name: str, value: Any) -> str:
        spelling = value.strip().lower() if isinstance(value, str) else ""
        if spelling not in words:
            hint = did_you_mean(spelling, words) if spelling else ""
            raise refuse_value(name, value, f"one of {', '.join(words)}{hint}")
        return spelling

    return read


def read_text(name: str, value: Any) -> str:
    """A text that is not empty.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str) or not value or value == "auto":
        raise refuse_value(name, value, "a text")
    return value


def read_names(name: str, value: Any) -> list[str]:
    """A list of texts.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse_value(name, value, "a list of names")
    return value


def read_class_paths(name: str, value: Any) -> list[str]:
    """A list of classes with their modules.

    Raises:
        ValueError: it is something else.
    """
    if not all("." in path.strip(".") for path in read_names(name, value)):
        raise refuse_value(name, value, "a list of classes such as torch.nn.Linear")
    return read_names(name, value)


def read_parameter(name: str, value: Any) -> Any:
    """A value of the optimizer's params: numbers and switches that are text are read.

    Raises:
        ValueError: it is "auto" and the Trainer of transformers would fill it in.
    """
    if isinstance(value, list):
        return [read_parameter(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("true", "false"):
        return read_switch(name, value)
    key = name.rpartition(".")[2].partition("[")[0]
    if value == "auto" and key in _FILLED_BY_TRANSFORMERS:
        raise refuse_value(name, value, "a number")
    parsed = _parse_number(value)
    return value if parsed is None else parsed


def check_depth(tree: Any) -> None:
    """Refuse JSON that is nested deeper than any config is, and than Python's stack may be.

    Args:
        tree: JSON values, in objects and lists.

    Raises:
        ValueError: it is.
    """
    level = [tree]
    for _ in range(_DEEPEST):
        inner = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = [value for values in inner for value in values]
    if level:
        raise ValueError(f"the DeepSpeed config is nested more than {_DEEPEST} levels deep.")


def is_off(value: Any) -> bool:
    """Whether a key asks for nothing: null, "auto", false, nothing in it, or a disabled block."""
    if isinstance(value, dict):
        if "enabled" in value:
            return is_off(value["enabled"])
        return all(is_off(inner) for inner in value.values())
    return value in (None, False, "", "auto", []) or str(value).strip().lower() == "false"


def _parse_number(value: Any) -> int | float | None:
    """The finite number that a value is or spells; None where it is none."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return _parse_number(kind(value))
            except ValueError:
                pass
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= 1e300 and math.isfinite(value) else None
