"""How does a run live through its steps again with one layer group frozen? Forks of a checkpoint.

A fork is an ordinary run that goes on from a copy of another run's checkpoint. The forks of one
event lie in a folder like that of a grid, a cell for each.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.config.stored import from_json
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed.engine_keys import drop_idle_keys
from mocov3_ds.monitoring.metrics_file import drop_rows_after, read_rows
from mocov3_ds.recipes import RECIPES
from mocov3_ds.stability.cell_flags import config_flag, flatten_config
from mocov3_ds.stability.cells import Outcome, read_outcome
from mocov3_ds.stability.executors import run_here
from mocov3_ds.stability.grid import Cell

FROZEN_RATE = 1e-30
"""Rate that stands for frozen: no weight moves, while the momentum encoder goes on as before. A
rate of 0 would take the group out of training, and its momentum encoder's copy would jump."""
_ENGINE = "deepspeed.json"
_NOT_COPIED = ("recipe", "name", "runs", "stop_after_steps", "deepspeed_config", "ds")

ShowOutcomes = Callable[[Iterator[Outcome], int], object]
"""consumes the outcomes of so many forks and shows each"""


class ForkFolder:
    """The folder of the forks of one run.

    Args:
        folder: the folder; it exists.
        settings: the run's `config.json`.
        launcher: command line before train.py, see `grid_folder.prepare_folder`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], launcher: str) -> None:
        self._folder, self._settings = folder, settings
        for inner in ("logs", "outcomes"):
            (folder / inner).mkdir(exist_ok=True)
        engine = drop_idle_keys(settings["deepspeed"])
        atomic.write_text(folder / _ENGINE, json.dumps(engine, indent=1))
        self._stops: dict[str, int] = {}
        self._tree: dict[str, Any] = {
            "name": "replay",
            "scale": "",
            "title": "Replay",
            "about": "",
            "launcher": launcher,
            "cells": {},
        }

    def run_folder(self, name: str) -> Path:
        """Run folder of a fork."""
        return self._folder / "cells" / name

    def add(
        self, name: str, slowed: Mapping[str, float], *, stop: int, source: Path, saved: Path | None
    ) -> None:
        """Prepare a fork in which some groups learn at a fraction of their rate, or not at all.

        A fork whose folder is there already stays as it is.

        Args:
            name: name of the fork.
            slowed: layer group -> its rate relative to the run's; 0 = frozen.
            stop: last step of the fork.
            source: run folder that the checkpoint and the log are copied from.
            saved: checkpoint that the fork goes on from; None = it begins with the run's first
                step.
        """
        settings = json.loads(json.dumps(self._settings))
        for group, factor in slowed.items():
            slow_group(settings["config"], group, factor)
        flags = run_flags(settings["config"])
        flags += ["--deepspeed_config", str((self._folder / _ENGINE).absolute())]
        flags += ["--stop_after_steps", str(stop)]
        cell = dataclasses.asdict(Cell(name, name, {"seed": 0}, {}))
        self._tree["cells"][name] = {**cell, "flags": flags, "slowed": dict(slowed)}
        self._stops[name] = stop
        atomic.write_text(self._folder / "grid.json", json.dumps(self._tree, indent=1))
        if saved is not None and not (self.run_folder(name) / "config.json").exists():
            _copy_run(saved, source, self.run_folder(name), settings)

    def train(self, names: Sequence[str], workers: int, show: ShowOutcomes) -> None:
        """Train forks to their last step; those that have come there are left alone.

        Args:
            names: names of the forks.
            workers: how many forks are trained at a time.
            show: called with the outcomes as they come, and their number.

        Raises:
            ValueError: a fork neither came to its last step nor diverged.
        """
        unfinished = self._unfinished(names)
        show(run_here(self._folder, unfinished, workers), len(unfinished))
        for name in self._unfinished(names):
            outcome = read_outcome(self._folder, name)
            if outcome is None or outcome.status != "diverged":
                reason = outcome.message if outcome else "it did not run"
                raise ValueError(f"the fork {self.run_folder(name)} failed: {reason}")

    def _unfinished(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._last_step(name) < self._stops[name]]

    def _last_step(self, name: str) -> int:
        rows = read_rows(self.run_folder(name) / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0


def _copy_run(saved: Path, source: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """Make a run folder that goes on from a checkpoint of another run."""
    target.mkdir(parents=True, exist_ok=True)
    folder = target / "checkpoints" / saved.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    (target / "checkpoints" / "latest").write_text(saved.name + "\n")
    for name in ("metrics.jsonl", "signals.json", "signals.f32"):
        if (source / name).exists():
            shutil.copy2(source / name, target / name)
    drop_rows_after(target / "metrics.jsonl", checkpoint.step_in_name(saved))
    # the last thing: with it the fork is complete
    atomic.write_text(target / "config.json", json.dumps(settings, indent=1))


def slow_group(config: dict[str, Any], group: str, factor: float) -> None:
    """Multiply a group's rate in the `config` part of a `config.json` by `factor`; 0 = frozen."""
    rates = dict(entry.partition("=")[::2] for entry in config["model"].get("group_lr", ()))
    rates[group] = f"{float(rates.get(group, 1)) * max(factor, FROZEN_RATE):g}"
    config["model"]["group_lr"] = [f"{name}={rate}" for name, rate in rates.items()]


def run_flags(config: Mapping[str, Any]) -> list[str]:
    """The `config` part of a `config.json` as flags; what its recipe sets is left out."""
    values = from_json({"config": config})
    defaults = dict(flatten_config(RECIPES[values.recipe].config))
    flags = ["--recipe", values.recipe]
    for key, value in flatten_config(values):
        if key not in _NOT_COPIED and value != defaults[key]:
            flags += config_flag(key, value)
    return flags
