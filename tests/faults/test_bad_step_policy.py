"""A bad sample in a real run on two ranks: named, stopped at, skipped, rewound, replayed."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mocov3_ds import train
from mocov3_ds.checkpoints.checkpoint import Checkpoint, folders
from mocov3_ds.config import TroubleConfig
from mocov3_ds.data.loader import Batch
from mocov3_ds.distributed import heartbeat
from mocov3_ds.faults.replay import nearest, replay
from mocov3_ds.training.run import Run
from mocov3_ds.training.step_limits import Guard
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, digests_of, rows_of

POISON = 40  # this sample's first view is not finite: steps 6, 8, 10
_views = Run.views


def poisoned_views(job: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    x1_BCHW, x2_BCHW = _views(job, batch)
    if job.config.name.startswith("doubted"):  # step 6 is bad until the run comes from before 4
        if job.step == 5 and job.guard.returned_to != 2:
            x1_BCHW.fill_(3e38)  # too large for the patch projection
        return x1_BCHW, x2_BCHW
    x1_BCHW[batch.ids_B == POISON, 1, 2, 3] = torch.nan
    return x1_BCHW, x2_BCHW


def outcomes(folder: str, command_lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and words of the real entry point; `replay RUN STEP` is the other one."""
    os.chdir(folder)
    Run.views = poisoned_views  # type: ignore[method-assign]
    found = []
    for command_line in command_lines:
        words = io.StringIO()
        if command_line[0] == "replay":
            lines = replay(Path(command_line[1]), int(command_line[2]))
            found.append((0, "\n".join(lines)))
            continue
        sys.argv = ["train.py", *command_line]
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            status = train.main()
            heartbeat.stop()
        found.append((status, words.getvalue()))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of this module in one start of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    make_set(str(folder / "train"), [20, 7, 23])
    common = [*SMALL, "--data.shards", "train", "--knn.probes", "0", "--epochs", "4"]

    def line(name: str, *flags: str) -> list[str]:
        return [*common, "--name", name, *flags]

    skip, rewind = ("--trouble.policy", "skip"), ("--trouble.policy", "rewind")
    cases = {
        "stop": line("stopped"),
        "replay": ["replay", "runs/stopped", ""],
        "skip after stop": line("stopped", *skip),
        "skip": line("skipped", *skip),
        "skip, first part": line("halves", *skip, "--stop_after_steps", "7"),
        "skip, second part": line("halves", *skip),
        "too many": line("many", *skip, "--trouble.limit", "1"),
        "rewind": line("rewound", *rewind),
        "rewind, first part": line("again", *rewind, "--stop_after_steps", "9"),
        "rewind, second part": line("again", *rewind),
        "rewind twice": line("doubted", *rewind),
        "rewind twice, first part": line("doubted too", *rewind, "--stop_after_steps", "7"),
        "rewind twice, second part": line("doubted too", *rewind),
    }
    first = run_ranks(2, outcomes, str(folder), [cases.pop("stop")], timeout=600)[0][0]
    (record,) = (folder / "runs/stopped/trouble").glob("*.json")
    step = json.loads(record.read_text())["step"]
    cases["replay"][2] = str(step)
    said = run_ranks(2, outcomes, str(folder), [*cases.values()], timeout=600)[0]
    return {
        "folder": folder / "runs",
        "step": step,
        "stop": first,
        **dict(zip(cases, said, strict=True)),
    }


def record_of(found: dict[str, Any]) -> dict[str, Any]:
    path = found["folder"] / f"stopped/trouble/step-{found['step']:08d}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_stop_names_tensor_rank_step_and_sample(found: dict[str, Any]) -> None:
    status, said = found["stop"]
    assert status == 3, said
    sentence = next(line for line in said.splitlines() if line.startswith("train.py: error: "))
    assert (
        f"step {found['step']}: the loss is nan; the first that is not finite: view 1" in sentence
    )
    assert f"bad samples: img{POISON}.jpg in t-002.tar. runs/stopped/trouble/step-" in sentence
    assert f"mocov3 replay runs/stopped {found['step']} looks at it again" in sentence
    record = record_of(found)
    (suspect,) = record["suspects"]
    assert suspect["id"] == record["ids"][suspect["rank"]][suspect["row"]] == POISON
    assert suspect["key"] == f"img{POISON}.jpg"
    assert suspect["norms"][0] == "nan"
    assert isinstance(suspect["norms"][1], float)
    assert record["batch"] == found["step"] - 1
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert stages["view 1"]["not_finite"] == 1
    assert stages["view 1"]["ranks"] == [suspect["rank"]]
    assert stages["view 2"]["not_finite"] == stages["features 2"]["not_finite"] == 0
    assert len(record["gradients"]) > 20
    # nothing of the bad step is in the log
    assert [row["step"] for row in rows_of(found["folder"] / "stopped")][: found["step"] - 1] == (
        list(range(1, found["step"]))
    )


def test_replay_sees_what_the_run_saw(found: dict[str, Any]) -> None:
    _, said = found["replay"]
    lines = said.splitlines()
    record = record_of(found)
    for stage in record["stages"]:
        assert any(
            line.startswith(f"{stage['name']} ")
            and line.split()[-2:] == [f"{stage['largest']:.5g}", str(stage["not_finite"])]
            for line in lines
        ), (stage, said)
    (suspect,) = record["suspects"]
    assert any(f"sample {POISON}, img{POISON}.jpg in t-002.tar" in line for line in lines)
    assert f"features' norms nan {suspect['norms'][1]:.4g}" in said
    with Image.open(found["folder"].parent / lines[-1]) as picture:
        assert picture.size == (2 * 16 + 4, 16)
        assert len(picture.getcolors(10**4) or []) > 50
    assert not list((found["folder"] / "stopped/trouble").glob("replay*"))


def test_skip_goes_on_and_resumes_bit_for_bit(found: dict[str, Any]) -> None:
    runs = found["folder"]
    for case in ("skip after stop", "skip", "skip, first part", "skip, second part"):
        assert found[case][0] == 0, found[case][1]
    rows = rows_of(runs / "skipped")
    assert [row["step"] for row in rows] == list(range(1, 13))
    bad = [row for row in rows if not row["applied"]]
    assert bad[0]["step"] == found["step"]
    assert bad[0]["trouble"] == "the loss is nan"
    assert all("loss" not in row for row in bad)
    assert all(row["loss"] > 0 for row in rows if row["applied"])
    newest = Checkpoint(folders(runs / "skipped")[-1])
    assert newest.state["optimizer_steps"] == 12 - len(bad)
    trouble = newest.state["trouble"]
    assert trouble["count"] == len(bad)
    assert trouble["left_out"] == [[row["step"] - 1] * 2 for row in bad]
    for group in ("base", "optimizer", "momentum"):
        for name, tensor in newest.group(group).items():
            assert tensor.isfinite().all(), name
    for other in ("halves", "stopped"):
        assert rows_of(runs / other) == rows
        assert digests_of(runs / other) == digests_of(runs / "skipped")
        assert Checkpoint(folders(runs / other)[-1]).state["trouble"] == trouble


def test_the_limit_stops(found: dict[str, Any]) -> None:
    status, said = found["too many"]
    assert status == 3, said
    assert "That was bad step 2 of this run, more than --trouble.limit 1." in said


def test_rewind_leaves_out_the_range_and_resumes_bit_for_bit(found: dict[str, Any]) -> None:
    runs = found["folder"]
    for case in ("rewind", "rewind, first part", "rewind, second part"):
        assert found[case][0] == 0, found[case][1]
    rows = rows_of(runs / "rewound")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["applied"] for row in rows)
    newest = Checkpoint(folders(runs / "rewound")[-1])
    spans = newest.state["trouble"]["left_out"]
    assert newest.state["trouble"]["count"] == len(spans) > 0
    first, last = spans[0]
    assert last == found["step"] - 1
    assert first == (found["step"] - 1) // 2 * 2  # a checkpoint each second step
    assert newest.position == 12 + sum(last - first + 1 for first, last in spans)
    assert rows_of(runs / "again") == rows
    assert digests_of(runs / "again") == digests_of(runs / "rewound")
    assert "back to step" in found["rewind"][1]


def test_a_checkpoint_that_leads_to_trouble_twice_is_not_trusted(found: dict[str, Any]) -> None:
    runs = found["folder"]
    for case in ("rewind twice", "rewind twice, first part", "rewind twice, second part"):
        assert found[case][0] == 0, found[case][1]
    said = found["rewind twice"][1]
    assert "back to step 4, going on behind global batch 5 (bad step 1 of at most 10)" in said
    assert "back to step 2, going on behind global batch 7 (bad step 2 of at most 10)" in said
    newest = Checkpoint(folders(runs / "doubted")[-1])
    trouble = newest.state["trouble"]
    assert trouble["left_out"] == [[2, 7]]  # one range, though it was met in two parts
    assert newest.position == 12 + 6
    assert [row["step"] for row in rows_of(runs / "doubted")] == list(range(1, 13))
    assert rows_of(runs / "doubted too") == rows_of(runs / "doubted")
    assert digests_of(runs / "doubted too") == digests_of(runs / "doubted")
    kept = sorted(path.name for path in (runs / "doubted/trouble").iterdir())
    assert kept == [  # both bad steps are the sixth, from the same checkpoint
        "step-00000004-4",
        "step-00000004-6",
        "step-00000006-5.json",
        "step-00000006.json",
    ]
    assert json.loads((runs / "doubted/trouble/step-00000006.json").read_text())["batch"] == 7
    assert nearest(runs / "doubted", 6) == runs / "doubted/trouble/step-00000004-6"


def test_a_spike_is_measured_against_the_trailing_median() -> None:
    config = TroubleConfig(loss_spike=2.0, gradient_spike=3.0, window=25)
    guard = Guard(config, {})
    for step in range(19):
        guard.passed(5.0 + step % 3, 1.0)
    assert guard.loss_limit() == guard.norm_limit() == float("inf")
    guard.passed(6.0, 1.0)
    assert guard.loss_limit() == 12.0
    assert guard.norm_limit() == 3.0
    again = Guard(config, json.loads(json.dumps(guard.state())))
    assert again.loss_limit() == 12.0
    for _ in range(25):
        again.passed(1.0, 1.0)
    assert again.loss_limit() == 2.0  # older steps are forgotten
    off = Guard(TroubleConfig(), {})
    for _ in range(30):
        off.passed(1.0, 1.0)
    assert off.loss_limit() == off.norm_limit() == float("inf")
