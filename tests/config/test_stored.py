"""The `config.json` of a run is read, or refused in a sentence."""

import json

import pytest

from mocov3_ds.config.stored import from_json
from mocov3_ds.recipes import parse


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
