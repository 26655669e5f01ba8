"""One step of a run: what is counted, what is drawn, what the log says of it."""

import json
import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.momentum_encoder import ViewKeys
from mocov3_ds.model.shapes import EncoderShape, VitShape
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import (
    AdvancedStep,
    advance_run,
    batch_views,
    draw_depth,
    next_batch,
    seed_drawing,
)
from mocov3_ds.training.build import build_run
from mocov3_ds.training.noise_scale import draw_halves
from mocov3_ds.training.step import Draws, StepResult
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def result(loss: float, bad_reason: str = "") -> StepResult:
    nothing = torch.zeros(0)
    return StepResult(loss, nothing, nothing, (nothing, nothing), not bad_reason, 1.0, bad_reason)


def test_the_log_leaves_out_what_json_does_not_know() -> None:
    batch: Any = SimpleNamespace(wait_s=0.5)
    x = torch.zeros(0)
    good = AdvancedStep(batch, x, x, 1e-3, 0.99, result(2.0)).measured_values()
    assert good == {"loss": 2.0, "lr": 1e-3, "momentum": 0.99, "applied": True, "data_wait_s": 0.5}
    bad = AdvancedStep(batch, x, x, 1e-3, 0.99, result(math.nan, "the loss is nan"))
    values = bad.measured_values()
    assert "loss" not in values
    assert (values["trouble"], values["applied"]) == ("the loss is nan", False)
    json.dumps(values, allow_nan=False)


def test_a_rank_names_itself_where_its_data_cannot_be_read() -> None:
    def unreadable() -> Any:
        raise OSError("the store is away")
        yield

    run: Any = SimpleNamespace(loader=unreadable(), step=6)
    with pytest.raises(SystemExit, match="rank 0, step 7: the store is away"):
        next_batch(run)


def test_each_step_draws_from_a_seed_of_its_own() -> None:
    draws = []
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        run: Any = SimpleNamespace(config=SimpleNamespace(seed=seed), step=step)
        seed_drawing(run)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[3]
    assert len({*draws}) == 3


def test_stochastic_depth_draws_by_step_and_sample() -> None:
    def draw(step: int, sample_ids: list[int], drop_path: float = 0.5) -> torch.Tensor | None:
        vit = VitShape(image_size=16, patch_size=8, dim=16, depth=3, heads=2)
        shape = EncoderShape(backbone=vit, hidden=24, out=8, drop_path=drop_path)
        run: Any = SimpleNamespace(
            config=SimpleNamespace(seed=3),
            step=step,
            base=BaseEncoder(shape),
            device=torch.device("cpu"),
        )
        return draw_depth(run, torch.tensor(sample_ids))

    whole, part, later = draw(5, [*range(40)]), draw(5, [7, 8]), draw(6, [*range(40)])
    assert whole is not None and part is not None and later is not None
    assert whole.shape == (2, 40, 4)
    assert torch.equal(part, whole[:, 7:9])
    assert not torch.equal(later, whole)
    assert draw(5, [1], drop_path=0.0) is None


def steps_of_a_run(folder: Path) -> dict[str, Any]:
    make_set(str(folder / "train"), [20, 7, 23])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    flags += ["--runs", str(folder / "runs"), "--warmup_epochs", "0"]
    run = build_run(parse(flags), torch.device("cpu"))
    first = advance_run(run)
    out: dict[str, Any] = {"first": (first.result.applied, run.step, run.position)}
    views = batch_views(run, first.batch)
    out["views"] = all(map(torch.equal, views, (first.x1_BCHW, first.x2_BCHW)))
    keys = run.momentum_encoder.make_keys(first.x1_BCHW)
    out["same view"] = torch.equal(keys.features_BD, first.result.momentum_features_BD)
    before = {n: t.clone() for n, t in run.base.named_parameters()}
    dropped = advance_run(run, dropped=True)
    out["dropped"] = (dropped.result.applied, run.step, run.position)
    out["reason"] = dropped.result.bad_reason
    out["unmoved"] = all(torch.equal(before[n], t) for n, t in run.base.named_parameters())
    run.close()
    return out


def test_steps_are_counted_unless_they_were_dropped(tmp_path: Path) -> None:
    [out] = run_ranks(1, steps_of_a_run, tmp_path)
    assert out["first"] == (True, 1, 1)
    assert out["views"] and out["same view"]
    assert out["dropped"] == (False, 1, 1)
    assert out["reason"].startswith("the gradient's norm")
    assert out["unmoved"]


def noise_of_a_run(folder: Path, keys_of_all: bool) -> list[tuple[float, float]]:
    """Noise of the second step as measured, and from each half sent through copies alone."""
    make_set(str(folder / "train"), [20, 7, 23])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0", "--batch", "12"]
    flags += ["--runs", str(folder / "runs"), "--model.drop_path", "0.5", "--chunk", "4"]
    run = build_run(parse([*flags, "--signals.noise_every", "2"]), torch.device("cpu"))
    advance_run(run)
    network, encoder = deepcopy(run.model).train(), deepcopy(run.momentum_encoder)
    step = advance_run(run)
    views, ids_B = (step.x1_BCHW, step.x2_BCHW), step.batch.sample_ids_B
    run.step -= 1  # stochastic depth is drawn by step and sample
    found = [(step.measured["noise_trace"], step.measured["gradient_square"])]
    gradients = []
    for rows in map(torch.from_numpy, draw_halves(ids_B.numpy())):
        x1, x2 = views[0][rows], views[1][rows]
        all_keys = [encoder.make_keys(x) for x in views]
        keys = [ViewKeys(k.keys_BP[rows], k.features_BD[rows]) for k in all_keys]
        if not keys_of_all:
            keys = [encoder.make_keys(x) for x in (x1, x2)]
        draws = Draws(factors_VBM=draw_depth(run, ids_B[rows]))
        loss = network(x1, x2, lambda keys=keys: keys, draws).loss
        trained = [p for p in network.parameters() if p.requires_grad]
        parts = torch.autograd.grad(loss, trained)
        gradients.append(torch.cat([part.reshape(-1) for part in parts]).double())
    run.close()
    first, second = gradients
    spread = (first - second).square().sum() * 6 / 2  # a half has 6 images
    return [*found, (float(spread), float(first @ second))]


@pytest.mark.parametrize("keys_of_all", [False, True])
def test_each_half_of_a_measured_batch_is_a_batch_of_its_own(
    tmp_path: Path, keys_of_all: bool
) -> None:
    [(measured, alone)] = run_ranks(1, noise_of_a_run, tmp_path, keys_of_all)
    # fp32, chunks of four against whole halves; with keys of the whole batch it is another number
    assert (measured == pytest.approx(alone, rel=1e-4)) is not keys_of_all
