"""A bad step is measured stage by stage, and the tensors, ranks and samples to blame are named."""

import json
import math
from pathlib import Path

import torch

from mocov3_ds.faults.diagnosis import Diagnosis, Stage, StageName, Suspect, diagnose_step
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from tests.data.sets import make_set
from tests.faults.bad_runs import POISON, BadRuns
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL
from tests.training.test_run import differing, state_of
from tests.training.test_trained_state import SigmoidLoss


def test_a_record_names_tensor_rank_and_sample(bad_runs: BadRuns) -> None:
    record = bad_runs.record()
    (suspect,) = record["suspects"]
    assert suspect["id"] == record["ids"][suspect["rank"]][suspect["row"]] == POISON
    assert suspect["key"] == f"img{POISON}.jpg"
    assert suspect["norms"][0] == "nan"
    assert isinstance(suspect["norms"][1], float)
    assert record["batch"] == bad_runs.step - 1
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert stages["view 1"]["not_finite"] == 1
    assert stages["view 1"]["ranks"] == [suspect["rank"]]
    assert stages["view 2"]["not_finite"] == stages["features 2"]["not_finite"] == 0
    assert len(record["gradients"]) > 20
    assert [stage["name"] for stage in record["stages"]] == [*StageName]
    assert record["first"] == "view 1"


def changed_by_diagnosis(folder: Path) -> list[str]:
    make_set(str(folder / "train"), [20])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    run = build_run(
        parse([*flags, "--runs", str(folder / "runs")]), torch.device("cpu"), SigmoidLoss()
    )
    step = advance_run(run)
    before = state_of(run)
    diagnose_step(run, step.x1_BCHW, step.x2_BCHW, step.batch.sample_ids_B)
    changed = differing(before, state_of(run))
    run.close()
    return changed


def test_the_run_stays_as_it_is(tmp_path: Path) -> None:
    assert run_ranks(1, changed_by_diagnosis, tmp_path) == [[]]


def diagnosis(stages: list[Stage], gradients: list[Stage], suspects: list[Suspect]) -> Diagnosis:
    return Diagnosis(
        loss=math.nan, stages=stages, gradients=gradients, suspects=suspects, ids=[[7]]
    )


def test_the_first_that_is_not_finite_is_named_whatever_comes_after() -> None:
    good = Stage(StageName.VIEW_1, 3.0, 0)
    queries, loss = (Stage(name, 1.0, 4) for name in (StageName.QUERIES_1, StageName.LOSS))
    weight = Stage("base.backbone.norm.weight", 1.0, 2)
    assert diagnosis([good, queries, loss], [weight], []).first is queries
    assert diagnosis([good], [weight], []).first is weight
    assert diagnosis([good], [], []).first is None


def test_only_the_views_are_the_input() -> None:
    view, keys = (Stage(name, 1.0, 1, (0,)) for name in (StageName.VIEW_2, StageName.KEYS_1))
    assert diagnosis([view, keys], [], []).is_of_the_input
    assert not diagnosis([Stage(StageName.VIEW_2, 1.0, 0), keys], [], []).is_of_the_input


def test_numbers_that_json_does_not_know_become_text() -> None:
    suspect = Suspect(0, 3, 7, (math.inf, 2.0), certain=True, distance=math.inf)
    text = json.dumps(diagnosis([Stage(StageName.LOSS, 0.0, 1, (0, 1))], [], [suspect]).as_json())
    content = json.loads(text)
    assert content["loss"] == "nan"
    assert content["stages"] == [{"name": "loss", "largest": 0.0, "not_finite": 1, "ranks": [0, 1]}]
    assert content["suspects"][0]["norms"] == ["inf", 2.0]
    assert content["ids"] == [[7]]
