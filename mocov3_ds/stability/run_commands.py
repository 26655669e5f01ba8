"""Which commands repeat a run, continue it, and use what came of it?"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocov3_ds.data.storage import hide_secrets
from mocov3_ds.distributed.engine_keys import read_settings
from mocov3_ds.recipes import RECIPES
from mocov3_ds.stability.forks import run_flags


def list_commands(run: Path, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each command does, and the command line for a shell.

    Args:
        run: run folder, as the commands name it.
        tree: content of its `config.json`.
    """
    folder = str(run)
    return [
        ("Make it again, under another name, on as many ranks as there are", repeat_line(tree)),
        ("Weighted k-NN with the whole training set", shlex.join(["mocov3", "knn", folder])),
        ("Pictures of what the encoder sees", shlex.join(["mocov3", "look", folder])),
        ("Take the encoder away", shlex.join(["mocov3", "export", folder, "--to", "timm"])),
    ]


def repeat_line(tree: Mapping[str, Any]) -> str:
    """Command line that trains a run with the same settings; a sentence where it cannot be told.

    Args:
        tree: content of the run's `config.json`.
    """
    try:
        flags = [*run_flags(tree["config"]), *engine_flags(tree)]
    except (ValueError, KeyError) as error:
        return f"not known: {error}"
    name = f"{tree['config'].get('name') or tree['config']['recipe']}-again"
    return hide_secrets(shlex.join(["deepspeed", "mocov3_ds/train.py", *flags, "--name", name]))


def engine_flags(tree: Mapping[str, Any]) -> list[str]:
    """`--ds` for each part of a run's DeepSpeed settings that is not the recipe's.

    Args:
        tree: content of the run's `config.json`.
    """
    default = read_settings(dict(RECIPES[tree["config"]["recipe"]].engine))
    flags = []
    for key, value in tree.get("deepspeed", {}).items():
        if default.get(key) != value:
            flags += ["--ds", f"{key}={json.dumps(value)}"]
    return flags
