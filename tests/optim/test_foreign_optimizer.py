"""An optimizer that the product does not know goes through all of it, by what the base class asks.

Steps under each ZeRO stage, signals, gradient norm, state, JSON block, planner, stability grid and
the trainer with its checkpoints.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mocov3_ds import cli, train
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.distributed.gradients import full_gradients
from mocov3_ds.monitoring.alarm_response import check_response
from mocov3_ds.optim.build import build_optimizer, find_optimizer
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.recipes import parse
from mocov3_ds.stability.grid import load_grid
from tests.data.sets import make_set
from tests.optim import engines, plain
from tests.optim.engines import Case, largest_error, movement_error, rule
from tests.optim.foreign import RATE, Lion, PlainOptimizer
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL

STEPS = 6


def signal_error(ours: dict[str, float], expected: dict[str, float]) -> float:
    """Largest relative error of a tensor's signals; NaN must be where the formula has it."""
    assert ours.keys() == expected.keys()
    pairs = [(ours[key], expected[key]) for key in expected]
    assert all((a != a) == (b != b) for a, b in pairs), (ours, expected)
    return max((abs(a - b) / max(abs(b), 0.1) for a, b in pairs if b == b), default=0.0)


def start_engine(kind: str, stage: int) -> tuple[Any, ShardedOptimizer]:
    """An engine over the odd model, the optimizer built from a JSON block."""
    engines.quiet()
    model, case = plain.odd_model(), Case(stage)
    block = {"type": kind.lower(), "params": {"lr": RATE}}
    optimizer = build_optimizer(block, model.named_parameters(), rule)
    engine, *_ = engines.deepspeed.initialize(
        model=model, optimizer=optimizer, config=engines.ds_config(case)
    )
    optimizer.attach(engine)
    return engine, optimizer


def run_stage(kind: str, stage: int) -> dict[str, float]:
    """Errors after some steps and after going on, in a fresh engine, from the full state."""
    engine, optimizer = start_engine(kind, stage)
    optimizer.measure_all(True)
    first = engines.weights(optimizer)
    formula = PlainOptimizer(kind, first, rule)
    worst = {"signals": 0.0, "grad_norm": 0.0}
    batches = list(engines.batches(Case(stage), STEPS))
    for number, ((x, y),) in enumerate(batches):
        if number == STEPS // 2:  # go on from what a checkpoint holds
            state, count = dict(optimizer.full_state()), optimizer.step_count
            engines.stop(engine)
            engine, optimizer = start_engine(kind, stage)
            optimizer.measure_all(True)
            optimizer.load_full_state(state.__getitem__, count)
        engines.backward(engine, x, y)
        gradients = {name: g.clone() for name, g in full_gradients(engine.module)}
        engine.step()
        expected = formula.step(gradients)
        rows = optimizer.signals().rows()
        errors = [signal_error(rows[name], row) for name, row in expected.items()]
        worst["signals"] = max(worst["signals"], *errors)
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        worst["grad_norm"] = max(worst["grad_norm"], abs(optimizer.grad_norm() / norm - 1))
    state = dict(optimizer.full_state())
    weights = {name: tensors["weight"].double() for name, tensors in state.items()}
    worst["weights"] = movement_error(weights, formula.w, {n: w.double() for n, w in first.items()})
    for key in optimizer.moments:
        moments = {name: tensors[key].double() for name, tensors in state.items()}
        worst[key] = largest_error(moments, formula.m, formula.m)
    worst["steps"] = abs(optimizer.step_count - STEPS)
    engines.stop(engine)
    return worst


def run_stages() -> dict[tuple[str, int], dict[str, float]]:
    """Errors of both optimizers at each stage."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    return {
        (kind, stage): run_stage(kind, stage) for kind in ("Lion", "SignSgd") for stage in range(4)
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_signals_and_state_are_the_formula(world_size: int) -> None:
    for result in run_ranks(world_size, run_stages):
        for case, errors in result.items():
            assert all(error < 5e-6 for error in errors.values()), (case, errors)


def test_json_blocks_name_it_in_any_spelling() -> None:
    named = [("w", torch.nn.Parameter(torch.ones(2, 2)))]
    assert find_optimizer("lion") is find_optimizer("LION") is Lion
    built = build_optimizer({"type": "Lion", "params": {"lr": 0.5, "weight_decay": 0.25}}, named)
    assert type(built) is Lion
    assert (built.param_groups[0]["lr"], built.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    with pytest.raises(
        ValueError, match=r"Lion has no parameter 'weigth_decay' \(did you mean weight_decay\?\)"
    ):
        build_optimizer({"type": "Lion", "params": {"lr": 1.0, "weigth_decay": 1}}, named)
    with pytest.raises(ValueError, match=r"type 'SGD' is unknown; .*Lion, SignSgd"):
        build_optimizer({"type": "SGD"}, named)


@pytest.mark.parametrize(("kind", "moments", "bytes_moved"), [("Lion", 1, 20), ("SignSgd", 0, 12)])
def test_the_planner_counts_its_state_and_its_bytes(
    kind: str,
    moments: int,
    bytes_moved: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan(kind: str) -> dict[str, Any]:
        block = json.dumps({"type": kind, "params": {"lr": 1e-4}})
        command = ["mocov3", "plan", "--recipe", "vit_s16", "--gpus", "1xA100-80GB", "--json"]
        monkeypatch.setattr(sys, "argv", [*command, "--ds", f"optimizer={block}"])
        assert cli.main() == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["optimizer"] == kind.lower()
        option: dict[str, Any] = printed["options"][0]
        return option

    optimizer_class = find_optimizer(kind)
    assert optimizer_class is not None and optimizer_class.bytes_moved() == bytes_moved
    adamw, lamb, foreign = plan("AdamW"), plan("Lamb"), plan(kind)
    parts = [option["memory"]["parts"]["optimizer's moments"] for option in (adamw, foreign)]
    assert parts[1] == parts[0] * moments / 2
    # at one bandwidth, AdamW's 28 bytes a weight and LAMB's 40 say what a byte takes
    byte_s = (lamb["step_s"] - adamw["step_s"]) / 12
    difference = (adamw["step_s"] - foreign["step_s"]) / byte_s
    assert difference == pytest.approx(28 - bytes_moved, rel=1e-6)


def test_a_stability_grid_lays_it_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    axes = "lr = [1e-3]\nweight_decay = [0.1, 0.2]\noptimizer = ['Lion']\n"
    path.write_text(f"[base]\nepochs = 3\n[axes]\n{axes}")
    cells = load_grid(str(path), "tiny", 1).cells  # which checks each cell as the trainer would
    assert len(cells) == 4  # each with its frozen twin
    decays = set()
    for cell in cells:
        block = parse([*cell.flags(), "--name", cell.name]).engine["optimizer"]
        assert block["type"] == "Lion"
        decays.add(block["params"]["weight_decay"])
    assert decays == {0.1, 0.2}


def train_run(folder: str, kind: str, sessions: dict[str, list[int]]) -> None:
    """Train by the trainer itself: name of a run -> steps after which it is stopped."""
    os.chdir(folder)
    block = json.dumps({"type": kind, "params": {"lr": 1e-3}})
    flags = [*SMALL, "--ds", f"optimizer={block}", "--save.keep", "9"]
    flags += ["--data.shards", "shards", "--knn.probes", "0"]
    flags += ["--signals.every", "1", "--alarm.response", "halve_lr"]
    for name, stops in sessions.items():
        for stop in stops:
            train.train(parse([*flags, "--name", name, "--stop_after_steps", str(stop)]))


@pytest.mark.parametrize("kind", ["Lion", "SignSgd"])
def test_the_trainer_saves_and_resumes_it(tmp_path: Path, kind: str) -> None:
    make_set(str(tmp_path / "shards"), [20, 7, 23])
    run_ranks(2, train_run, str(tmp_path), kind, {"unbroken": [6], "resumed": [4, 6]})
    folders = [tmp_path / "runs" / name for name in ("unbroken", "resumed")]
    unbroken, resumed = (Checkpoint(f / "checkpoints" / "step-00000006") for f in folders)
    optimizer_class = find_optimizer(kind)
    assert optimizer_class is not None
    assert bool(unbroken.tensor_names("optimizer")) == bool(optimizer_class.moments)
    for group in ("base", "optimizer"):
        names = unbroken.tensor_names(group)
        assert names == resumed.tensor_names(group)
        assert all(
            torch.equal(unbroken.read_tensor(group, name), resumed.read_tensor(group, name))
            for name in names
        )
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    assert sum("grad_norm" in row for row in rows) == 6


def test_an_alarm_cannot_clip_its_updates() -> None:
    with pytest.raises(ValueError, match="clip does not go with Lion: it has no update clip"):
        check_response(
            parse(["--alarm.response", "clip"]).config.alarm,
            Lion([("w", torch.nn.Parameter(torch.ones(2, 2)))], lr=0.1),
        )
