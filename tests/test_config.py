"""Bounds beside the fields, settings that contradict one another, config.json of a run."""

import dataclasses
import json
from pathlib import Path

import pytest

from mocov3_ds.config import (
    Config,
    MocoConfig,
    ModelConfig,
    check_config,
    from_json,
)
from mocov3_ds.recipes import parse


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(moco=MocoConfig(temperature=0)), "--moco.temperature 0 cannot be"),
        (Config(model=ModelConfig(drop_path=1.5)), "--model.drop_path 1.5 cannot be"),
        (Config(epochs=0), "--epochs 0 cannot be; it must be above 0"),
        (Config(epochs=30, warmup_epochs=40), "--warmup_epochs 40 cannot be; it must be 0 to 30"),
        (Config(keep_chunks=2), "--keep_chunks 2 has no effect without --chunk"),
    ],
)
def test_contradictions_and_bad_numbers(config: Config, words: str) -> None:
    check_config(Config())
    with pytest.raises(ValueError, match=words):
        check_config(config)


def test_each_number_has_bounds_but_the_free_ones() -> None:
    """A new setting gets its bounds beside the field, or its name here."""

    def without_bounds(kind: object, prefix: str = "") -> set[str]:
        names = set()
        for entry in dataclasses.fields(kind):
            value = getattr(kind, entry.name)
            if dataclasses.is_dataclass(value):
                names |= without_bounds(value, f"{prefix}{entry.name}.")
            elif type(value) in (int, float) and not hasattr(entry.type, "__metadata__"):
                names.add(prefix + entry.name)
        return names

    free = {"data.cache_gb", "views.crop_min", "views.crop_max", "knn.temperature"}
    assert without_bounds(Config()) == free | {"warmup_epochs"}  # up to `epochs`


def test_sizes_beyond_any_machine_are_refused_before_anything_is_built() -> None:
    for flag in ("model.depth", "model.dim", "views.image_size"):
        with pytest.raises(ValueError, match=f"--{flag} {10**30} cannot be; it must be 1 to"):
            parse([f"--{flag}", str(10**30)])


def test_a_damaged_config_of_a_run_is_refused() -> None:
    tree = json.loads(json.dumps(parse([]).as_json()))
    assert from_json(tree).batch == parse([]).config.batch
    for model in ({"depth": 10**30}, {"depth": " "}, {"dim": [1]}, {"depth": float("inf")}):
        damaged = {
            **tree,
            "config": {**tree["config"], "model": {**tree["config"]["model"], **model}},
        }
        with pytest.raises(ValueError, match=r"config\.json was written by version .* not"):
            from_json(damaged)


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
