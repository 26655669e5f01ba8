"""Commands on the page of a run: the one that repeats it means the same settings."""

import json
import shlex
from pathlib import Path

from mocov3_ds.recipes import parse
from mocov3_ds.stability.run_commands import list_commands, repeat_line

FLAGS = [
    "--recipe",
    "cifar10",
    "--batch",
    "512",
    "--name",
    "a b",
    "--model.group_lr",
    "block_0=0.2",
]
FLAGS += ["--ds", "optimizer.params.lr=0.25", "--ds", "zero_optimization.stage=2"]
FLAGS += ["--views.blur_p", "0.5", "0.25", "--views.fixed", "--log", "csv"]


def test_the_same_settings_come_out_of_it() -> None:
    tree = parse(FLAGS).as_json()
    launcher, script, *flags = shlex.split(repeat_line(tree))
    assert (launcher, script, flags[-2:]) == (
        "deepspeed",
        "mocov3_ds/train.py",
        ["--name", "a b-again"],
    )
    again = parse([*flags[:-2], "--name", "a b"]).as_json()
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(tree))


def test_names_are_quoted_and_secrets_hidden() -> None:
    tree = parse(["--data.shards", "s3://me:pw@bucket/x", "--name", "$(x)"]).as_json()
    line = repeat_line(tree)
    assert "'$(x)-again'" in line and "pw@" not in line
    assert "mocov3 export 'a $b' --to timm" in dict(list_commands(Path("a $b"), tree)).values()


def test_settings_of_another_version_are_said_to_be_unknown() -> None:
    assert repeat_line({"config": {"recipe": "none"}}).startswith("not known: ")
    assert repeat_line({"config": {"recipe": "tiny", "no_such": 1}}).startswith("not known: ")
