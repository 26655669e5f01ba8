"""A bad sample in a real run on two ranks: stopped at, skipped, rewound; every way resumes."""

import json

from mocov3_ds.checkpoints.checkpoint import Checkpoint, list_checkpoints
from tests.faults.bad_runs import POISON, BadRuns
from tests.test_train import digests_of, rows_of


def test_stop_names_tensor_rank_step_and_sample(bad_runs: BadRuns) -> None:
    status, said = bad_runs.outcomes["stop"]
    assert status == 3, said
    sentence = next(line for line in said.splitlines() if line.startswith("train.py: error: "))
    assert (
        f"step {bad_runs.step}: the loss is nan; the first that is not finite: view 1" in sentence
    )
    assert f"bad samples: img{POISON}.jpg in t-002.tar. runs/stopped/trouble/step-" in sentence
    assert f"mocov3 replay runs/stopped {bad_runs.step} looks at it again" in sentence
    # nothing of the bad step is in the log
    assert [row["step"] for row in rows_of(bad_runs.folder / "stopped")][: bad_runs.step - 1] == (
        list(range(1, bad_runs.step))
    )


def test_skip_goes_on_and_resumes_bit_for_bit(bad_runs: BadRuns) -> None:
    runs = bad_runs.folder
    for case in ("skip after stop", "skip", "skip, first part", "skip, second part"):
        assert bad_runs.outcomes[case][0] == 0, bad_runs.outcomes[case][1]
    rows = rows_of(runs / "skipped")
    assert [row["step"] for row in rows] == list(range(1, 13))
    bad = [row for row in rows if not row["applied"]]
    assert bad[0]["step"] == bad_runs.step
    assert bad[0]["trouble"] == "the loss is nan"
    assert all("loss" not in row for row in bad)
    assert all(row["loss"] > 0 for row in rows if row["applied"])
    newest = Checkpoint(list_checkpoints(runs / "skipped")[-1])
    assert newest.state["optimizer_steps"] == 12 - len(bad)
    trouble = newest.state["trouble"]
    assert trouble["count"] == len(bad)
    assert trouble["left_out"] == [[row["step"] - 1] * 2 for row in bad]
    for group in ("base", "optimizer", "momentum"):
        for name, tensor in newest.read_group(group).items():
            assert tensor.isfinite().all(), name
    for other in ("halves", "stopped"):
        assert rows_of(runs / other) == rows
        assert digests_of(runs / other) == digests_of(runs / "skipped")
        assert Checkpoint(list_checkpoints(runs / other)[-1]).state["trouble"] == trouble


def test_the_limit_stops(bad_runs: BadRuns) -> None:
    status, said = bad_runs.outcomes["too many"]
    assert status == 3, said
    assert "That was bad step 2 of this run, more than --trouble.limit 1." in said


def test_rewind_leaves_out_the_range_and_resumes_bit_for_bit(bad_runs: BadRuns) -> None:
    runs = bad_runs.folder
    for case in ("rewind", "rewind, first part", "rewind, second part"):
        assert bad_runs.outcomes[case][0] == 0, bad_runs.outcomes[case][1]
    rows = rows_of(runs / "rewound")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["applied"] for row in rows)
    newest = Checkpoint(list_checkpoints(runs / "rewound")[-1])
    spans = newest.state["trouble"]["left_out"]
    assert newest.state["trouble"]["count"] == len(spans) > 0
    first, last = spans[0]
    assert last == bad_runs.step - 1
    assert first == (bad_runs.step - 1) // 2 * 2  # a checkpoint each second step
    assert rows[first]["query_patches"] < 16  # other patches of other samples at this step
    assert newest.position == 12 + sum(last - first + 1 for first, last in spans)
    assert rows_of(runs / "again") == rows
    assert digests_of(runs / "again") == digests_of(runs / "rewound")
    assert "back to step" in bad_runs.outcomes["rewind"][1]


def test_a_checkpoint_that_leads_to_a_bad_step_twice_is_not_trusted(bad_runs: BadRuns) -> None:
    runs = bad_runs.folder
    for case in ("rewind twice", "rewind twice, first part", "rewind twice, second part"):
        assert bad_runs.outcomes[case][0] == 0, bad_runs.outcomes[case][1]
    said = bad_runs.outcomes["rewind twice"][1]
    assert "back to step 4, going on behind global batch 5 (bad step 1 of at most 10)" in said
    assert "back to step 2, going on behind global batch 7 (bad step 2 of at most 10)" in said
    newest = Checkpoint(list_checkpoints(runs / "doubted")[-1])
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
