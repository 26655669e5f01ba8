"""Relative paths of earlier runs are found from any working folder."""

import dataclasses
from pathlib import Path

import pytest

from mocov3_ds.checkpoints.run_paths import anchor_to_run
from mocov3_ds.config.parts import DataConfig
from mocov3_ds.config.run_config import Config


def test_relative_paths_of_an_earlier_run_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shards = tmp_path / "runs/old", tmp_path / "sets/train"
    for folder in (run, shards, tmp_path / "elsewhere/sets/near"):
        folder.mkdir(parents=True)
    data = DataConfig(shards="sets/train", probe_shards="s3://bucket/x")
    config = Config(name="old", data=data)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert anchor_to_run(config, Path("../runs/old")).data.shards == str(shards)
    assert anchor_to_run(config, Path("../runs/old")).data.probe_shards == "s3://bucket/x"
    assert anchor_to_run(config, tmp_path / "moved/away") == config  # it lay elsewhere
    near = dataclasses.replace(config, data=DataConfig(shards="sets/near"))
    assert anchor_to_run(near, run) == near  # found from here
    gone = dataclasses.replace(config, data=DataConfig(shards="sets/gone"))
    assert anchor_to_run(gone, run) == gone
