"""Settings and links of a run as a flat table."""

import json
import sys
from pathlib import Path

import pytest

from mocov3_ds.monitoring.run_facts import read_facts


def test_settings_are_flat_and_have_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data.shards", "https://u:pw@x/y?token=abc z"])
    tree = {
        "config": {"batch": 8, "views": {"blur_p": [1.0, 0.1]}, "data": {"limit": None}},
        "deepspeed": {"optimizer": {"params": {"lr": 0.1}}},
        "data_digest": "d",
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    facts = read_facts(tmp_path)
    assert facts["batch"] == 8
    assert facts["views.blur_p"] == "[1.0, 0.1]"
    assert facts["data.limit"] == ""
    assert facts["ds.optimizer.params.lr"] == 0.1
    assert facts["data_digest"] == "d"
    assert facts["run.folder"] == str(tmp_path)
    command = str(facts["run.command"])
    assert "--data.shards" in command and "pw" not in command and "abc" not in command
    assert all(isinstance(value, str | int | float | bool) for value in facts.values())


def test_a_folder_without_settings_has_its_links(tmp_path: Path) -> None:
    assert read_facts(tmp_path)["run.folder"] == str(tmp_path)
