"""Which class is one image of? What `.cls` and `.json` members, cells and fields say.

A label is a class name, a whole number, or none. What is neither (a fraction, a list, a truth
value) is refused by name instead of being read as something else.
"""

import json
import re
from decimal import Decimal
from typing import Any

from mocov3_ds.data.class_names import parse_number

Label = str | int | None
"""Class name, number, or none."""

STATED_NONE = -1
"""says that an image has no class, as test sets and gaps in tables do"""

LONGEST_JSON = 1 << 20
"""Bytes of the largest `.json` of a sample that is read for its label."""
LONGEST_CLS = 1024
"""Bytes of the largest `.cls` of a sample that is read."""

JSON_LABELS = ("label", "cls")
"""entries of a `.json` that hold the label, the first that is there"""

_EXACT = 2**53  # the largest whole number up to which floats have all
_DIGITS = 40  # of a number; ids of 128 bits have 39
_SHOWN = 60  # characters of a value in a message
_DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)")


def parse_label(text: str, place: str) -> Label:
    """Read a label that is written as text; None where the text is blank.

    `7` and `7.0` (pandas writes whole numbers so where a column has gaps) are the number 7.

    Args:
        text: The label as it is written.
        place: Where it stands, for messages.

    Raises:
        ValueError: The text is a number that is not whole.
    """
    text = text.strip()
    if _DECIMAL.fullmatch(text):
        return convert_label(float(text), place)
    number = parse_number(text)
    return number if number is not None else text or None


def convert_label(value: Any, place: str) -> Label:
    """Read a label that is a value of JSON or of a table.

    Args:
        value: Text, number, or None; NaN is None, as pandas has it.
        place: Where it stands, for messages.

    Raises:
        ValueError: It is something else.
    """
    if value is None or isinstance(value, str):
        return None if value is None else parse_label(value, place)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if value != value:
            return None
        if isinstance(value, float) and abs(value) > _EXACT:
            raise ValueError(f"{place} is {value!r}, a float too large to be an exact number.")
        if abs(value) < 10**_DIGITS and value == int(value):
            return int(value)
        text = str(value) if isinstance(value, float | Decimal) else f"of over {_DIGITS} digits"
        raise ValueError(f"{place} is {text}; a label is one name or one whole number.")
    text = repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    raise ValueError(
        f"{place} is {text} ({type(value).__name__}); a label is one name or one whole number. "
        "--label NAME takes another."
    )


def parse_cls(data: bytes, name: str) -> Label:
    """Read the label in a `.cls` member of a webdataset tar.

    Args:
        data: Bytes of the member.
        name: Name of the member and its archive, for messages.

    Raises:
        ValueError: The member is empty, no text, or holds no label.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not text in UTF-8; it should hold the label.") from None
    if not text:
        raise ValueError(f"{name} is empty; it should hold the label.")
    if len(text.splitlines()) > 1:
        raise ValueError(f"{name} has several lines; a label is one name or one whole number.")
    return parse_label(text, f"the label of {name}")


def parse_json_label(data: bytes, name: str, entry: str = "") -> Label:
    """Read the label in a `.json` member of a webdataset tar; None where it has none.

    Args:
        data: Bytes of the member.
        name: Name of the member and its archive, for messages.
        entry: Name of the entry that is the label; empty = `label`, or else `cls`.

    Raises:
        ValueError: The member is not JSON, or the label is neither a name nor a whole number.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"{name} is not valid JSON: {reason}.") from None
    if not isinstance(tree, dict):
        return None
    for key in [entry] if entry else JSON_LABELS:
        if key in tree:
            return convert_label(tree[key], f"{key!r} of {name}")
    return None
