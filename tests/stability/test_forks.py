"""Flags that repeat a run, rates of groups, and forks as folders of ordinary runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.config.run_config import Settings
from mocov3_ds.recipes import RECIPES, parse
from mocov3_ds.stability.forks import ForkFolder, run_flags, slow_group


@pytest.mark.parametrize("recipe", ["tiny", "vit_b16_lamb"])
def test_the_flags_of_a_run_give_the_run_again(recipe: str) -> None:
    given = ["--recipe", recipe, "--batch", "64", "--views.fixed", "--views.blur_p", "0.5", "0"]
    given += ["--data.limit", "64", "--lr_schedule", "constant", "--model.patch_lr", "0.5"]
    given += ["--model.group_lr", "norm=0.5", "--model.group_lr", "block_0=0", "--name", "x"]
    run = parse(given)
    again = parse([*run_flags(run.as_json()["config"]), "--name", "x"])
    assert again.config == run.config
    assert run_flags(Settings(RECIPES[recipe].config, {}).as_json()["config"]) == [
        "--recipe",
        recipe,
    ]


def test_groups_are_slowed_from_what_they_have() -> None:
    config: dict[str, Any] = {"model": {"group_lr": ["norm=0.5"], "depth": 2}}
    slow_group(config, "norm", 0.5)
    slow_group(config, "block_1", 0.0)
    assert config["model"]["group_lr"] == ["norm=0.25", "block_1=1e-30"]


def test_a_fork_is_a_cell_with_the_runs_own_settings(tmp_path: Path) -> None:
    settings = parse(["--recipe", "tiny", "--batch", "64", "--name", "x"]).as_json()
    source = tmp_path / "run"
    saved = source / "checkpoints/step-00000020"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}")
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30))
    (source / "metrics.jsonl").write_text(rows)
    out = tmp_path / "out"
    out.mkdir()
    forks = ForkFolder(out, settings, sys.executable)
    forks.add("norm", {"norm": 0.5}, stop=40, source=source, saved=saved)
    tree = json.loads((out / "grid.json").read_text())
    flags = tree["cells"]["norm"]["flags"]
    assert flags[-2:] == ["--stop_after_steps", "40"]
    config = parse([*flags, "--name", "x"]).config
    assert config.batch == 64 and config.model.group_lr == ("norm=0.5",)
    fork = forks.run_folder("norm")
    assert json.loads((fork / "config.json").read_text())["config"]["batch"] == 64
    assert (fork / "metrics.jsonl").read_text().splitlines() == ['{"step": 10}', '{"step": 20}']
    assert (fork / "checkpoints/latest").read_text() == "step-00000020\n"
    # a fork that has begun stays as it is
    (fork / "metrics.jsonl").write_text(rows)
    forks.add("norm", {"norm": 0.5}, stop=40, source=source, saved=saved)
    assert (fork / "metrics.jsonl").read_text() == rows


def test_a_fork_that_fails_is_named(tmp_path: Path) -> None:
    settings = parse(["--recipe", "tiny", "--name", "x"]).as_json()
    program = tmp_path / "fails.sh"
    program.write_text("#!/bin/sh\necho error: no memory\nexit 1\n")
    program.chmod(0o755)
    forks = ForkFolder(tmp_path, settings, str(program))
    forks.add("norm", {"norm": 0.5}, stop=4, source=tmp_path, saved=None)
    with pytest.raises(ValueError, match=r"fork .*cells/norm failed: error: no memory"):
        forks.train(["norm"], 1, lambda outcomes, total: list(outcomes))
