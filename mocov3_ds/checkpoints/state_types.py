"""Which kind of value does each key of `state.json` have? Checked before anything is used.

The digest in the file shows that nothing was changed by accident; it is no signature. A checkpoint
may come from a stranger, and a number of his must not become a size, a position or a traceback.
"""

from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 2**53
"""counts beyond this are no counts of steps, batches or samples"""

Check = Callable[[Any], bool]
"""whether a value is of the kind that its key has"""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, length: int | None = None) -> Check:
    def is_list(value: Any) -> bool:
        right_length = isinstance(value, list) and length in (None, len(value))
        return right_length and all(check(item) for item in value)

    return is_list


def _object_of(check: Check, name: Check = _is_text) -> Check:
    def is_object(value: Any) -> bool:
        return isinstance(value, Mapping) and all(name(k) and check(v) for k, v in value.items())

    return is_object


def _object_with(**checks: Check) -> Check:
    """Objects in which each of these keys is of its kind, where it is there."""

    def is_object(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            check(value[key]) for key, check in checks.items() if key in value
        )

    return is_object


def _is_sample_id(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 16


_HISTORY = _list_of(_or_null(_is_number))

_KINDS: Mapping[str, tuple[Check, str]] = {
    "step": (_is_count, "a number of steps"),
    "position": (_is_count, "a number of global batches"),
    "optimizer_steps": (_is_count, "a number of steps"),
    "version": (_is_text, "a text"),
    "loss": (_is_text, "the name of a loss"),
    "loss_scale": (_object_of(_is_number), "an object of numbers"),
    "chunks": (
        _object_with(size=_is_count, kept=_is_count),
        "an object with the numbers size and kept",
    ),
    "watch": (
        _object_with(
            alarms=_object_with(rms=_HISTORY, grad=_HISTORY),
            answer_until=_is_count,
            quiet_until=_is_count,
        ),
        "an object with the history of the alarms",
    ),
    "trouble": (
        _object_with(
            count=_is_count,
            left_out=_list_of(_list_of(_is_count, length=2)),
            returned_to=_or_null(_is_count),
            losses=_list_of(_is_number),
            norms=_list_of(_is_number),
        ),
        "an object with counts of bad steps, and lists",
    ),
    "ancestry": (
        _list_of(_object_of(lambda value: _is_text(value) or _is_number(value))),
        "a list of what the run began with",
    ),
    "bad_samples": (
        _object_of(_is_text, name=_is_sample_id),
        "an object of sample numbers with reasons",
    ),
}
_REQUIRED = {"watch": ("alarms", "answer_until", "quiet_until"), "chunks": ("size", "kept")}


def check_types(state: Mapping[str, Any]) -> None:
    """Compare each value of `state.json` with the kind that its key has.

    Args:
        state: JSON values by name; those that are not there are not missed.

    Raises:
        ValueError: A value is of another kind; the sentence names key and value.
    """
    for key, (is_of_kind, kind) in _KINDS.items():
        if key not in state:
            continue
        value = state[key]
        has_all = isinstance(value, Mapping) and all(k in value for k in _REQUIRED.get(key, ()))
        if not is_of_kind(value) or (key in _REQUIRED and not has_all):
            text = repr(value) if len(repr(value)) <= 60 else f"{value!r:.57}..."
            raise ValueError(f"state.json has {key!r} = {text}, which is not {kind}")
