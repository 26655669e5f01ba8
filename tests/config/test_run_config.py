"""Paths of a new run."""

from pathlib import Path

import pytest

from mocov3_ds.recipes import parse


def test_new_runs_keep_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    flags = [
        "--data.shards",
        "sets/train",
        "--data.probe_shards=~/probes",
        "--save.mirror",
        "s3://b",
    ]
    config = parse(flags).config
    assert config.data.shards == str(tmp_path / "sets/train")
    assert config.data.probe_shards == "/home/ann/probes"
    assert config.save.mirror == "s3://b"
    assert (config.data.cache, config.folder) == ("", Path("runs/tiny"))
