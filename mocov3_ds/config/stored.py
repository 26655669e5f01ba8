"""The settings of a run as its `config.json` holds them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mocov3_ds.config.checks import check_config
from mocov3_ds.config.run_config import Config


def from_json(tree: Mapping[str, Any]) -> Config:
    """The `Config` of a run from the content of its `config.json`.

    Raises:
        ValueError: another version of the program wrote the file, or the file is damaged.
    """
    try:
        config: Config = _with_values(Config(), tree["config"])
        check_config(config)
        return config
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"config.json was written by version {tree.get('version')} of mocov3-ds and is not "
            f"understood by this one ({error})."
        ) from None


def _with_values(default: Any, tree: Mapping[str, Any]) -> Any:
    """A dataclass with some of its values replaced by those of a JSON object, field by field."""
    values = {}
    for name, value in tree.items():
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            values[name] = _with_values(current, value)
        else:
            values[name] = value if name == "image_size" else type(current)(value)
    return dataclasses.replace(default, **values)
