"""Replay: the event that is meant, flags that repeat a run, and forks that do what is said."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.config import RECIPES, Settings, parse
from mocov3_ds.stability import counterfactual as replays
from mocov3_ds.stability import run as runs
from mocov3_ds.stability.counterfactual import Replayed, find_event, flags_of, slow
from mocov3_ds.stability.verdict import GradientEvent, LossEvent, judge
from tests.data.sets import make_set
from tests.stability.synthetic import healthy
from tests.test_train import rows_of, start

LOSS = [LossEvent(first=p - 3, last=p + 4, peak=p, excess=e) for p, e in ((90, 0.1), (300, 0.4))]
BURST = GradientEvent(group="patch_embed", first=88, last=94, peak=91, ratio=9.0)


def test_which_event() -> None:
    calm = judge(healthy(0).series)
    with pytest.raises(ValueError, match=r"STABLE and has no event to replay"):
        find_event(dataclasses.replace(calm, verdict="STABLE", gradient_events=()), [], "largest")
    both = dataclasses.replace(calm, loss_events=tuple(LOSS), gradient_events=(BURST,))
    assert find_event(both, [], "largest") is LOSS[1]
    assert find_event(both, [], "100") is LOSS[0]
    assert find_event(dataclasses.replace(both, loss_events=()), [], "largest") is BURST
    none = dataclasses.replace(calm, loss_events=(), gradient_events=())
    assert find_event(none, LOSS, "80") is LOSS[0]
    with pytest.raises(ValueError, match="'last' must be 'largest' or a step; there are events"):
        find_event(both, [], "last")


@pytest.mark.parametrize("recipe", ["tiny", "vit_b16_lamb"])
def test_the_flags_of_a_run_give_the_run_again(recipe: str) -> None:
    given = ["--recipe", recipe, "--batch", "64", "--views.fixed", "--views.blur_p", "0.5", "0"]
    given += ["--data.limit", "64", "--lr_schedule", "constant", "--model.patch_lr", "0.5"]
    given += ["--model.group_lr", "norm=0.5", "--model.group_lr", "block_0=0", "--name", "x"]
    run = parse(given)
    again = parse([*flags_of(run.as_json()["config"]), "--name", "x"])
    assert again.config == run.config
    assert flags_of(Settings(RECIPES[recipe].config, {}).as_json()["config"]) == [
        "--recipe",
        recipe,
    ]


def test_groups_are_slowed_from_what_they_have() -> None:
    config: dict[str, Any] = {"model": {"group_lr": ["norm=0.5"], "depth": 2}}
    slow(config, "norm", 0.5)
    slow(config, "block_1", 0.0)
    assert config["model"]["group_lr"] == ["norm=0.25", "block_1=1e-30"]


def test_the_sentence_claims_no_more_than_the_forks_show() -> None:
    def sentence(*left: float, exact: bool = True, factor: float = 0.0) -> str:
        names = ("nothing", "patch_embed", "block_0", "norm")
        found = [Replayed(n, 0.4 * x, 5.0, x) for n, x in zip(names, left, strict=True)]
        return replays._sentence(found, LOSS[1], factor, exact)

    one = sentence(1.0, 0.1, 0.8, 0.9)
    assert one.startswith("Freezing patch_embed leaves 10% of the loss event at step 300;")
    assert "repeats the run bit for bit" in one
    assert "(so do norm 40%)" in sentence(1.0, 0.1, 0.8, 0.4)
    assert "Freezing no single group removes" in sentence(1.0, 0.7, 0.8, 0.9)
    assert "the least is left with patch_embed (70%)" in sentence(1.0, 0.7, 0.8, 0.9)
    assert "not bit-equal" in sentence(1.0, 0.1, 0.8, 0.9, exact=False)
    assert "Slowing to 0.2 of its rate block_0" in sentence(1.0, 0.9, 0.2, 0.9, factor=0.2)
    lost = sentence(math.nan, 0.9, 0.2, 0.9)
    assert "nothing can be said, although it repeats the run bit for bit" in lost
    assert "not exact" not in lost
    assert sentence(math.nan, 0.9, 0.2, 0.9, exact=False).endswith("the replay is not exact.")


def test_a_folder_is_of_one_replay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    replays._claim(out, tmp_path / "run", LOSS[0], 80, 0.0)
    replays._claim(out, tmp_path / "run", LOSS[0], 80, 0.0)
    for run, event, step, factor, words in (
        ("other", LOSS[0], 80, 0.0, f"run {tmp_path}/run there, {tmp_path}/other here"),
        ("run", LOSS[1], 80, 0.0, "event loss at step 90 there, loss at step 300 here"),
        ("run", BURST, 80, 0.0, "event loss at step 90 there, gradient at step 91 here"),
        ("run", LOSS[0], 70, 0.0, "from the checkpoint of step 80 there, the checkpoint of step"),
        ("run", LOSS[0], None, 0.0, "from the checkpoint of step 80 there, a rewind here"),
        ("run", LOSS[0], 80, 0.5, "factor 0.0 there, 0.5 here"),
    ):
        with pytest.raises(ValueError, match="holds another replay") as raised:
            replays._claim(out, tmp_path / run, event, step, factor)
        assert words in str(raised.value)
    (out / "replay.json").unlink()
    (out / "cells").mkdir()
    with pytest.raises(ValueError, match="forks of an earlier version"):
        replays._claim(out, tmp_path / "run", LOSS[0], 80, 0.0)


SMALL = [
    *("--batch", "16", "--epochs", "40", "--warmup_epochs", "0", "--views.image_size", "16"),
    *("--model.dim", "24", "--model.depth", "2", "--model.heads", "2", "--model.hidden", "32"),
    *("--model.out", "16", "--data.threads", "1", "--data.lanes", "4", "--data.limit", "16"),
    *("--views.fixed", "--lr_schedule", "constant", "--model.patch_lr", "1"),
    *("--knn.every_steps", "10", "--knn.probes", "30", "--knn.bank", "16"),
    *("--save.every_steps", "10", "--save.keep", "9", "--name", "whole"),
]


@pytest.mark.slow
def test_forks_go_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(str(tmp_path / "train"), [20])
    make_set(str(tmp_path / "probes"), [33])
    data = ["--data.shards", str(tmp_path / "train"), "--data.probe_shards"]
    data += [str(tmp_path / "probes"), "--ds", "optimizer.params.lr=0.02"]
    done = start([sys.executable, str(runs.TRAIN), *SMALL, *data], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/whole"
    event = LossEvent(first=27, last=30, peak=28, excess=0.1)
    monkeypatch.setattr(replays, "find_event", lambda judgement, jumps, which: event)
    monkeypatch.setattr(replays, "STEPS", 12)
    monkeypatch.setattr(replays, "AFTER", 2)

    def live(out: Path | None, **options: Any) -> replays.Answer:
        watched: list[str] = []
        answer = replays.replay(
            run,
            "largest",
            out,
            launcher=sys.executable,
            watch=lambda outcomes, total: watched.extend(o.cell for o in outcomes),
            **options,
        )
        (answer.out / "watched").write_text(json.dumps(watched))
        return answer

    out = tmp_path / "replay"
    answer = live(out, groups=["patch_embed"])
    assert (answer.start, answer.stop, answer.exact) == (20, 32, True)
    control, frozen = (rows_of(out / "cells" / name) for name in ("nothing", "patch_embed"))
    whole = [row for row in rows_of(run) if row["step"] <= 32]
    assert [row["loss"] for row in control[1:]] == [row["loss"] for row in whole[1:]]
    # frozen from the checkpoint on: the first loss after it is still the run's, the others are not
    assert [row["loss"] for row in frozen[1:22]] == [row["loss"] for row in whole[1:22]]
    assert frozen[25]["loss"] != whole[25]["loss"]
    assert [row.group for row in answer.found] == ["nothing", "patch_embed"]
    assert answer.found[0].left == 1.0 or math.isnan(answer.found[0].left)
    assert (out / "replay.png").stat().st_size > 1000
    assert "patch_embed" in replays.as_text(answer)
    assert len((out / "replay.csv").read_text().splitlines()) == 3
    # again: nothing is left to run
    assert live(out, groups=["patch_embed"]) == answer
    assert json.loads((out / "watched").read_text()) == []
    # another factor or another event would go on from these forks
    with pytest.raises(ValueError, match=r"factor 0\.0 there, 0\.5 here"):
        live(out, groups=["patch_embed"], factor=0.5)
    with pytest.raises(ValueError, match="group 'patch' is not one of patch_embed, cls, block_0"):
        live(out, groups=["patch"])

    # no checkpoint near the event: the run is repeated up to there first
    shutil.rmtree(run / "checkpoints/step-00000020")
    shutil.rmtree(run / "checkpoints/step-00000010")
    monkeypatch.setattr(replays, "BEFORE", 6)
    remade = live(tmp_path / "remade", groups=["norm"], factor=0.5)
    assert (remade.start, remade.exact) == (21, True)
    assert json.loads((tmp_path / "remade/watched").read_text()) == ["rewind", "nothing", "norm"]

    # an event near the end is replayed to the end of the schedule, in a folder of its own
    event = LossEvent(first=36, last=38, peak=37, excess=0.1)
    monkeypatch.setattr(replays, "find_event", lambda judgement, jumps, which: event)
    monkeypatch.setattr(replays, "STEPS", 60)
    last = live(None, groups=["norm"], factor=0.5)
    assert (last.start, last.stop, last.exact) == (30, 40, True)
    assert last.out == tmp_path / "runs/whole-replay-step-37-rate-0.5"
