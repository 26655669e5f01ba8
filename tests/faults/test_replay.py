"""`mocov3 replay`: it sees what the run saw, from the checkpoint that leads there."""

import json
from pathlib import Path

from PIL import Image

from mocov3_ds.faults.diagnosis import Diagnosis, Stage
from mocov3_ds.faults.replay import nearest_checkpoint, stage_table
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
