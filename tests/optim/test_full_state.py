"""State by name: saved at one world size and stage, continued at another; DeepSpeed's own, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from mocov3_ds.distributed import zero
from tests.optim import engines
from tests.optim.engines import Case, largest_error, movement_error
from tests.ranks_pool import run_ranks

BEFORE, AFTER = 5, 4
FULL = dict[str, dict[str, Tensor]]

SAVED = [Case(1), Case(3), Case(2, "fp16"), Case(1, "fp32", "lars"), Case(2, "fp32", "adamw")]
SAVED += [Case(2, "fp32", "muon"), Case(0, "fp32", "muon"), Case(0, "bf16", "muon")]
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}


def batches(case: Case) -> list[Any]:
    return list(engines.batches(case, BEFORE + AFTER))


def full(optimizer: Any) -> FULL:
    return {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.full_state()}


def save(cases: list[Case]) -> list[dict[str, Any]]:
    """State in the middle of each run, and its end."""
    results = []
    for case in cases:
        engine, optimizer = engines.start(case)
        first = engines.weights(optimizer)
        engines.train(engine, batches(case)[:BEFORE])
        state = full(optimizer)
        seen = seen_by_deepspeed(engine, state) if case.stage else True
        scale = zero.read_loss_scale(engine)
        engines.train(engine, batches(case)[BEFORE:])
        results.append(
            {"first": first, "state": state, "seen": seen, "scale": scale, "end": full(optimizer)}
        )
        engines.stop(engine)
    return results


def seen_by_deepspeed(engine: Any, state: FULL) -> bool:
    """Whether DeepSpeed's own access finds each moment, as its checkpoints' converters need it."""
    return all(
        torch.equal(safe_get_full_optimizer_state(parameter, key).view(-1), moment.view(-1))
        for name, parameter in engine.module.named_parameters()
        for key, moment in state.get(name, {}).items()
        if key in ("exp_avg", "exp_avg_sq")
    )


def resume(jobs: list[tuple[Case, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Load each state into a fresh engine that has already gone elsewhere; go on to the end."""
    results = []
    for case, saved in jobs:
        engine, optimizer = engines.start(case)
        engines.train(engine, engines.batches(case, 2, seed=99))
        optimizer.load_full_state(saved["state"].__getitem__, BEFORE)
        zero.load_loss_scale(engine, saved["scale"])
        state = full(optimizer)
        low = engines.low_precision_error(engine, {n: s["weight"] for n, s in state.items()})
        engines.train(engine, batches(case)[BEFORE:])
        results.append(
            {
                "equal": bit_equal(state, saved["state"]),
                "low": low,
                "end": full(optimizer),
                "steps": optimizer.step_count,
                "scale": zero.read_loss_scale(engine),
            }
        )
        engines.stop(engine)
    return results


def bit_equal(one: FULL, other: FULL) -> bool:
    return all(
        torch.equal(tensor, other[name][key])
        for name, s in one.items()
        for key, tensor in s.items()
    )


def deepspeed_checkpoints(folder: str, cases: list[Case]) -> list[bool]:
    """Whether DeepSpeed's own checkpoint continues bit for bit on the same layout."""
    equal = []
    for index, case in enumerate(cases):
        engine, optimizer = engines.start(case)
        engines.train(engine, batches(case)[:BEFORE])
        engine.save_checkpoint(folder, tag=str(index))
        engines.train(engine, batches(case)[BEFORE:])
        want, steps = full(optimizer), optimizer.step_count
        engines.stop(engine)
        engine, optimizer = engines.start(case)
        engine.load_checkpoint(folder, tag=str(index))
        engines.train(engine, batches(case)[BEFORE:])
        equal.append(bit_equal(full(optimizer), want) and optimizer.step_count == steps == 9)
        engines.stop(engine)
    return equal


def on_two_ranks(folder: str) -> dict[str, Any]:
    saved = save(SAVED)
    same = resume(list(zip(SAVED, saved, strict=True)))
    cases = [Case(2), Case(3, "bf16"), Case(1, "bf16", config=FP32_GRADIENTS)]
    cases += [Case(1, "bf16", "muon"), Case(0, "bf16", "muon")]
    return {"saved": saved, "same": same, "deepspeed": deepspeed_checkpoints(folder, cases)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    first: dict[str, Any] = run_ranks(2, on_two_ranks, str(folder), timeout=600)[0]
    return first


def test_the_same_layout_goes_on_bit_for_bit(two_ranks: dict[str, Any]) -> None:
    for case, saved, resumed in zip(SAVED, two_ranks["saved"], two_ranks["same"], strict=True):
        assert resumed["equal"] and saved["seen"], case
        assert resumed["low"] == 0.0, case
        assert resumed["steps"] == BEFORE + AFTER
        assert bit_equal(resumed["end"], saved["end"]), case


def test_fp16_goes_on_with_its_loss_scale(two_ranks: dict[str, Any]) -> None:
    saved, resumed = two_ranks["saved"][2], two_ranks["same"][2]
    assert saved["scale"]["cur_iter"] == BEFORE
    assert resumed["scale"]["cur_iter"] == BEFORE + AFTER
    assert two_ranks["saved"][0]["scale"] == {}


def check_elsewhere(world_size: int, jobs: list[tuple[Case, dict[str, Any]]]) -> None:
    results = run_ranks(world_size, resume, jobs, timeout=900)[0]
    for (case, saved), resumed in zip(jobs, results, strict=True):
        assert resumed["equal"], case
        assert resumed["low"] == 0.0, case
        want = {n: s["weight"] for n, s in saved["end"].items()}
        got = {n: s["weight"] for n, s in resumed["end"].items()}
        # own gradients, summed in another order
        # (which Muon raises where a matrix hardly has a direction, see test_muon.py)
        tolerance = 1e-3 if case.optimizer == "muon" else 2e-5
        assert movement_error(got, want, saved["first"]) < tolerance, case
        moment = next(key for key in saved["end"]["wide.weight"] if key != "weight")
        want = {n: s[moment] for n, s in saved["end"].items()}
        moments = {n: s[moment] for n, s in resumed["end"].items()}
        assert largest_error(moments, want, want) < tolerance


def test_another_world_size_and_stage_go_on(two_ranks: dict[str, Any]) -> None:
    saved = two_ranks["saved"]
    to_others = [(Case(3), saved[0]), (Case(1), saved[1]), (Case(3, "fp32", "lars"), saved[3])]
    to_others += [(Case(stage, "fp32", "muon"), saved[5]) for stage in (3, 0)]
    check_elsewhere(3, to_others)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_world_size_and_stage_goes_on(two_ranks: dict[str, Any], world_size: int) -> None:
    saved = two_ranks["saved"]
    jobs = [(Case(stage), state) for stage in range(4) for state in saved[:2]]
    jobs += [(Case(stage, "fp32", "lars"), saved[3]) for stage in range(4)]
    jobs += [(Case(stage, "fp32", "adamw"), saved[4]) for stage in range(4)]
    jobs += [(Case(stage, "fp32", "muon"), saved[5]) for stage in range(4)]
    check_elsewhere(world_size, jobs)


def test_checkpoints_of_deepspeed_go_on_bit_for_bit(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["deepspeed"] == [True] * 5
