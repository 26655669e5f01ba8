"""Which classes has an image that a table gives a list of? They become its KEY.json in the shards.

    a column `labels` of lists    row ["cat", "dog"]    KEY.json {"labels": ["cat", "dog"]}

An image with a list has no single class, also where the list has one entry. An empty list says that
the image has none of the classes; a row without a list says nothing, and is refused.
"""

import json
from collections.abc import Sequence
from typing import Any

_SHOWN = 60  # characters of a value in a message


def holds_lists(kind: Any) -> bool:
    """Whether a column's type is that of lists of names or of whole numbers."""
    import pyarrow as pa

    types = pa.types
    is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not any(test(kind) for test in is_list):
        return False
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind.value_type) for test in (types.is_integer, types.is_null, *texts))


def stated_names(feature: Any) -> tuple[str, ...]:
    """Class names that Hugging Face's description of a column of lists carries; () = none.

    Args:
        feature: Entry of the column; its inner feature is named `feature`, or alone in a list.
    """
    inner = feature[0] if isinstance(feature, list) and feature else feature
    inner = inner.get("feature", inner) if isinstance(inner, dict) else inner
    names = inner.get("names") if isinstance(inner, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def write_list(values: Any, column: str, place: str, names: Sequence[str]) -> bytes:
    """Bytes of the KEY.json of an image.

    Args:
        values: List of names or whole numbers, as the table has it.
        column: Name of the column.
        place: Where it stands, for messages.
        names: Class names that numbers are positions in; empty = numbers stay.

    Raises:
        ValueError: There is no list, or it holds a gap, or a number that has no name.
    """
    if values is None:
        raise ValueError(
            f"{place} has no list; an image without any of the classes has an empty one. --label - "
            "takes the images without labels."
        )
    classes = []
    for value in values:
        if value is None:
            raise ValueError(f"{place} is {str(values)[:_SHOWN]}, a list with a gap (null).")
        if isinstance(value, int) and names:
            if not 0 <= value < len(names):
                raise ValueError(f"{place} holds {value}, and the file names {len(names)} classes.")
            value = names[value]
        classes.append(value)
    return json.dumps({column: classes}).encode()
