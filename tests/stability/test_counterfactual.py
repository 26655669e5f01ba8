"""Which event is repeated, what the answer claims, and forks that do what is said."""

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocov3_ds.stability.cells import TRAIN
from mocov3_ds.stability.counterfactual import (
    Counterfactual,
    CounterfactualOptions,
    ForkResult,
    Span,
    claim_folder,
    describe_results,
    find_event,
    format_answer,
    measure_event,
    repeat_without_groups,
)
from mocov3_ds.stability.findings import GradientEvent, LossEvent
from mocov3_ds.stability.verdict import judge
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


def test_the_sentence_claims_no_more_than_the_forks_show() -> None:
    def sentence(*remaining: float, exact: bool = True, factor: float = 0.0) -> str:
        names = ("nothing", "patch_embed", "block_0", "norm")
        results = [ForkResult(n, 0.4 * x, 5.0, x) for n, x in zip(names, remaining, strict=True)]
        return describe_results(results, LOSS[1], factor, exact)

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
    claim_folder(out, tmp_path / "run", LOSS[0], 80, 0.0)
    claim_folder(out, tmp_path / "run", LOSS[0], 80, 0.0)
    for run, event, step, factor, words in (
        ("other", LOSS[0], 80, 0.0, f"run is {tmp_path}/run there, {tmp_path}/other here"),
        ("run", LOSS[1], 80, 0.0, "event is loss at step 90 there, loss at step 300 here"),
        ("run", BURST, 80, 0.0, "event is loss at step 90 there, gradient at step 91 here"),
        (
            "run",
            LOSS[0],
            70,
            0.0,
            "from is the checkpoint of step 80 there, the checkpoint of step",
        ),
        ("run", LOSS[0], None, 0.0, "from is the checkpoint of step 80 there, a rewind here"),
        ("run", LOSS[0], 80, 0.5, "factor is 0.0 there, 0.5 here"),
    ):
        with pytest.raises(ValueError, match="holds another replay") as raised:
            claim_folder(out, tmp_path / run, event, step, factor)
        assert words in str(raised.value)
    (out / "replay.json").unlink()
    (out / "cells").mkdir()
    with pytest.raises(ValueError, match="forks of an earlier version"):
        claim_folder(out, tmp_path / "run", LOSS[0], 80, 0.0)


SMALL = [
    *("--batch", "16", "--epochs", "40", "--warmup_epochs", "0", "--views.image_size", "16"),
    *("--model.dim", "24", "--model.depth", "2", "--model.heads", "2", "--model.hidden", "32"),
    *("--model.out", "16", "--data.threads", "1", "--data.lanes", "4", "--data.limit", "16"),
    *("--views.fixed", "--lr_schedule", "constant", "--model.patch_lr", "1"),
    *("--knn.every_steps", "10", "--knn.probes", "30", "--knn.bank", "16"),
    *("--save.every_steps", "10", "--save.keep", "9", "--name", "whole"),
]


@pytest.mark.slow
def test_forks_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [20])
    make_set(str(tmp_path / "probes"), [33])
    data = ["--data.shards", str(tmp_path / "train"), "--data.probe_shards"]
    data += [str(tmp_path / "probes"), "--ds", "optimizer.params.lr=0.02"]
    done = start([sys.executable, str(TRAIN), *SMALL, *data], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/whole"
    event = LossEvent(first=27, last=30, peak=28, excess=0.1)

    def repeat(
        out: Path | None, event: LossEvent, span: Span, **options: Any
    ) -> tuple[Counterfactual, list[str]]:
        """The answer, and the forks that had to be trained for it."""
        trained: list[str] = []
        answer = repeat_without_groups(
            run,
            event,
            out,
            CounterfactualOptions(launcher=sys.executable, span=span, **options),
            show=lambda outcomes, total: trained.extend(outcome.cell for outcome in outcomes),
        )
        return answer, trained

    out, span = tmp_path / "replay", Span(steps=12, steps_after=2)
    answer, _ = repeat(out, event, span, groups=("patch_embed",))
    assert (answer.start, answer.stop, answer.exact) == (20, 32, True)
    control, frozen = (rows_of(out / "cells" / name) for name in ("nothing", "patch_embed"))
    original = [row for row in rows_of(run) if row["step"] <= 32]
    assert [row["loss"] for row in control[1:]] == [row["loss"] for row in original[1:]]
    # frozen from the checkpoint on: the first loss after it is still the run's, the others are not
    assert [row["loss"] for row in frozen[1:22]] == [row["loss"] for row in original[1:22]]
    assert frozen[25]["loss"] != original[25]["loss"]
    assert [row.group for row in answer.results] == ["nothing", "patch_embed"]
    assert answer.results[0].remaining == 1.0 or math.isnan(answer.results[0].remaining)
    assert (out / "replay.png").stat().st_size > 1000
    assert "patch_embed" in format_answer(answer)
    lines = (out / "replay.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0] == "group,loss_excess,gradient,left"
    # the second time nothing remains to be run
    assert repeat(out, event, span, groups=("patch_embed",)) == (answer, [])
    # another factor or another event would go on from these forks
    with pytest.raises(ValueError, match=r"factor is 0\.0 there, 0\.5 here"):
        repeat(out, event, span, groups=("patch_embed",), factor=0.5)
    with pytest.raises(ValueError, match="group 'patch' is not one of patch_embed, cls, block_0"):
        repeat(out, event, span, groups=("patch",))

    # no checkpoint near the event: the run is repeated up to there first
    shutil.rmtree(run / "checkpoints/step-00000020")
    shutil.rmtree(run / "checkpoints/step-00000010")
    nearer = Span(steps=12, steps_after=2, steps_before=6)
    remade, trained = repeat(tmp_path / "remade", event, nearer, groups=("norm",), factor=0.5)
    assert (remade.start, remade.exact) == (21, True)
    assert trained == ["rewind", "nothing", "norm"]

    # an event near the end is replayed to the end of the schedule, in a folder of its own
    late = LossEvent(first=36, last=38, peak=37, excess=0.1)
    last, _ = repeat(None, late, Span(steps_before=6, steps_after=2), groups=("norm",), factor=0.5)
    assert (last.start, last.stop, last.exact) == (30, 40, True)
    assert last.out == tmp_path / "runs/whole-replay-step-37-rate-0.5"


def test_what_remains_is_measured_after_the_checkpoint_alone() -> None:
    series = healthy(0).series
    loss_T = np.full(len(series.steps_T), 4.0)
    loss_T[[299, 499]] = 6.0, 5.0
    grad_GT = np.ones_like(series.grad_linf_GT)
    grad_GT[2, 499] = 8.0
    spiky = dataclasses.replace(series, loss_T=loss_T, grad_linf_GT=grad_GT)
    assert measure_event(spiky, 300, 600) == (pytest.approx(0.25), 8.0)
    assert measure_event(spiky, 200, 400) == (pytest.approx(0.5), 1.0)
    stopped = dataclasses.replace(spiky, stopped_non_finite=True)
    assert measure_event(stopped, 300, 600) == (math.inf, math.inf)
