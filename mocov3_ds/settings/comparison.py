"""Settings of an earlier start beside those of the present one."""

from collections.abc import Iterator, Mapping
from typing import Any


def differences(earlier: Any, present: Any, name: str = "") -> Iterator[str]:
    """Every setting that is not the same, in words.

    Args:
        earlier: what was set before: JSON values, in mappings as deep as they come.
        present: what is set now, in the same form.
        name: what the two are called; the names of inner settings are appended with dots.

    Yields:
        `"NAME is EARLIER there, PRESENT here"`, sorted by name.
    """
    if isinstance(earlier, Mapping) and isinstance(present, Mapping):
        for key in sorted({*earlier, *present}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(earlier.get(key), present.get(key), inner)
    elif earlier != present:
        yield f"{name} is {earlier} there, {present} here"
