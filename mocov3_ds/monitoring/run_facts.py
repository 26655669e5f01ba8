"""What a tracker is told of a run beside its numbers: settings, place, and how it is continued."""

import json
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.data.storage import hide_secrets

Fact = str | int | float | bool


def read_facts(run: Path) -> dict[str, Fact]:
    """Return all settings of a run and its links, as one flat table without secrets.

    Settings have the names of their flags (`views.image_size`), DeepSpeed's begin with `ds.`; lists
    are text. `run.folder`, `run.host` and `run.command` say where the run is and how it goes on.

    Args:
        run: The run folder, with `config.json`.
    """
    path = run / "config.json"
    tree = json.loads(path.read_text()) if path.exists() else {}
    facts = {
        **flatten_facts(tree),
        "run.folder": str(run.absolute()),
        "run.host": socket.gethostname(),
        "run.command": shlex.join(sys.argv),
    }
    return {name: hide_secrets(x) if isinstance(x, str) else x for name, x in facts.items()}


def flatten_facts(tree: Mapping[str, Any]) -> dict[str, Fact]:
    """Return the settings in a `config.json` as one flat table.

    Args:
        tree: Content of the file.
    """
    origin = {name: tree[name] for name in ("version", "data_digest") if name in tree}
    return {
        **_flatten(tree.get("config", {}), ""),
        **_flatten(tree.get("deepspeed", {}), "ds."),
        **_flatten(origin, ""),
    }


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Fact]:
    """Return `a.b` -> value of a tree of JSON objects."""
    facts: dict[str, Fact] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            facts |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            facts[f"{prefix}{name}"] = value
        else:
            facts[f"{prefix}{name}"] = "" if value is None else json.dumps(value)
    return facts
