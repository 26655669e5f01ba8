"""`mocov3 replay`: it sees what the run saw, from the checkpoint that leads there."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mocov3_ds.config.parts import DataConfig, SaveConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.faults.diagnosis import Diagnosis, Stage
from mocov3_ds.faults.replay import (
    _config_of_copy,
    _copy_run,
    _engine_of_copy,
    nearest_checkpoint,
    stage_table,
)
from tests.faults.bad_runs import POISON, BadRuns


def test_replay_sees_what_the_run_saw(bad_runs: BadRuns) -> None:
    _, said = bad_runs.outcomes["replay"]
    lines = said.splitlines()
    record = bad_runs.record()
    for stage in record["stages"]:
        assert any(
            line.startswith(f"{stage['name']} ")
            and line.split()[-2:] == [f"{stage['largest']:.5g}", str(stage["not_finite"])]
            for line in lines
        ), (stage, said)
    (suspect,) = record["suspects"]
    assert any(f"sample {POISON}, img{POISON}.jpg in t-002.tar" in line for line in lines)
    assert f"features' norms nan {suspect['norms'][1]:.4g}" in said
    with Image.open(bad_runs.folder.parent / lines[-1]) as picture:
        assert picture.size == (2 * 16 + 4, 16)
        assert len(picture.getcolors(10**4) or []) > 50
    assert not list((bad_runs.folder / "stopped/trouble").glob("replay*"))


def test_a_step_that_was_bad_twice_is_reached_from_where_it_was_bad_last(bad_runs: BadRuns) -> None:
    run = bad_runs.folder / "doubted"
    assert nearest_checkpoint(run, 6) == run / "trouble/step-00000004-6"


def test_a_copy_writes_to_no_place_that_the_settings_name(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(cache="/theirs/cache"), save=SaveConfig(mirror="/theirs/mirror"), name="x"
    )
    copy = tmp_path / "trouble/replay-3"
    offload = {"device": "nvme", "nvme_path": "/theirs/swap"}
    engine: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "offload_param": dict(offload), "offload_optimizer": {}},
        "flops_profiler": {"enabled": True, "output_file": "/theirs/flops.txt"},
    }
    made = _config_of_copy(config, copy), _engine_of_copy(engine, copy)
    assert "theirs" not in str(made) and made[0].runs == tmp_path / "trouble"
    assert made[1]["zero_optimization"]["offload_param"]["device"] == "nvme"
    assert engine["zero_optimization"]["offload_param"] == offload


def test_a_link_in_the_place_of_the_copy_is_not_followed(tmp_path: Path) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    (theirs / "replay-3").mkdir(parents=True)
    (theirs / "replay-3/thesis.tex").write_text("mine")
    run.mkdir()
    (run / "trouble").symlink_to(theirs)
    with pytest.raises(ValueError, match="trouble is a link"):
        _copy_run(run, 3, None)
    (run / "trouble").unlink()
    (run / "trouble").mkdir()
    (run / "trouble/replay-3").symlink_to(theirs)
    with pytest.raises(ValueError, match="replay-3 is a link"):
        _copy_run(run, 3, None)
    assert (theirs / "replay-3/thesis.tex").read_text() == "mine"


def gradients(count: int, bad: int = 0) -> list[Stage]:
    return [Stage(f"w{i}", float(i), int(i < bad)) for i in range(count)]


def test_the_table_shows_stages_and_the_gradients_that_matter() -> None:
    stages = [Stage("view 1", 2.5, 0), Stage("loss", 7.0, 0)]
    healthy = stage_table(Diagnosis(7.0, stages, gradients(12), [], [[0]]))
    assert healthy[1].split() == ["view", "1", "2.5", "0"]
    assert [line.split()[1] for line in healthy[3:13]] == [f"w{i}" for i in range(11, 1, -1)]
    assert healthy[13] == "... and 2 gradients more, smaller"
    bad = stage_table(Diagnosis(7.0, stages, gradients(12, bad=11), [], [[0]]))
    assert [line.split()[1] for line in bad[3:13]] == [f"w{i}" for i in range(10)]
    assert bad[13] == "... and 1 gradients more, not finite"


def save_state(folder: Path, position: int | None = None) -> None:
    folder.mkdir(parents=True)
    state = {"step": 0, "files": {}} | ({} if position is None else {"position": position})
    (folder / "state.json").write_text(json.dumps(state))


def test_the_nearest_checkpoint_leads_to_the_batch_of_the_record(tmp_path: Path) -> None:
    assert nearest_checkpoint(tmp_path, 6) is None
    for step in (2, 4, 6):
        save_state(tmp_path / f"checkpoints/step-{step:08d}", position=step + 3)
    save_state(tmp_path / "trouble/step-00000004-4")
    later, linked = tmp_path / "checkpoints/step-00000004", tmp_path / "trouble/step-00000004-4"
    assert nearest_checkpoint(tmp_path, 6) == later  # the last time that it was at step 4
    record = tmp_path / "trouble/step-00000006.json"
    record.write_text(json.dumps({"batch": 5}))
    assert nearest_checkpoint(tmp_path, 6) == linked
    record.write_text(json.dumps({"batch": 8}))
    assert nearest_checkpoint(tmp_path, 6) == later
    record.write_text(json.dumps({"batch": 99}))  # from nowhere: the newest, and a sentence later
    assert nearest_checkpoint(tmp_path, 6) == later
    assert nearest_checkpoint(tmp_path, 2) is None
