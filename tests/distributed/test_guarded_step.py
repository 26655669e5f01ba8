"""A step is dropped on all ranks where the gradient is too large or not finite, and only there."""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.gradient_norm import speed_up_norm
from mocov3_ds.distributed.gradients import full_gradients
from mocov3_ds.distributed.guarded_step import DROP, scale_is_exhausted, step_within
from tests.optim import engines
from tests.optim.engines import Case
from tests.ranks_pool import run_ranks

LOSSES: dict[str, dict[str, Any]] = {
    "low loss": {"loss_sum": torch.tensor(6.0), "loss_limit": 6.5},
    "high loss": {"loss_sum": torch.tensor(6.0), "loss_limit": 2.5},
    "nan loss": {"loss_sum": torch.tensor(math.nan)},
}
"""What the steps of a series are told of the loss"""
CASES = [Case(0), Case(0, "bf16"), Case(1, clip=0.5), Case(2, "fp16"), Case(3, "bf16")]


def poison_gradient(parameter: torch.nn.Parameter) -> None:
    """Make the first rank's next gradient of a parameter NaN, once."""
    if ranks.rank() == 0:
        handle = parameter.register_hook(lambda gradient: gradient * math.nan)
        parameter.register_post_accumulate_grad_hook(lambda _: handle.remove())


def run_case(case: Case) -> dict[str, Any]:
    """Norms and whether the weights moved, for a series of limits."""
    engine, optimizer = engines.start(case)
    speed_up_norm(engine.optimizer)
    parameters = dict(engine.module.named_parameters())
    result: dict[str, Any] = {}
    limits = {"free": math.inf, "wide": 1e3, "narrow": 1e-6, "drop": DROP, "nan": math.inf}
    limits |= {"low loss": 1e3, "high loss": 1e3, "nan loss": math.inf}
    for (name, limit), ((x, y),) in zip(
        limits.items(), engines.batches(case, len(limits)), strict=True
    ):
        weights = engines.weights(optimizer)
        if name == "nan":
            poison_gradient(parameters["out.weight"])
        engines.backward(engine, x, y)
        scale = engine.optimizer.loss_scale if case.precision == "fp16" else 1.0
        gradients = {n: g / scale for n, g in full_gradients(engine.module)}
        expected = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
        norm, loss = step_within(engine, limit, **LOSSES.get(name, {}))
        moved = any(not torch.equal(w, weights[n]) for n, w in engines.weights(optimizer).items())
        result[name] = (norm, expected, moved, engine.was_step_applied())
        result["losses"] = [*result.get("losses", []), loss]
    result["count"] = optimizer.step_count
    if case.precision == "fp16":
        result["exhausted"] = exhaust_scale(case, engine, parameters["out.weight"])
    engines.stop(engine)
    return result


def exhaust_scale(case: Case, engine: Any, parameter: torch.nn.Parameter) -> list[Any]:
    """A scale at its floor, and steps that overflow there; then the floor is far away again."""
    scaler = engine.optimizer.loss_scaler
    scaler.cur_hysteresis, floor, scaler.min_scale = 1, scaler.min_scale, scaler.cur_scale
    seen: list[Any] = []
    for ((x, y),) in engines.batches(case, 2):
        poison_gradient(parameter)
        engines.backward(engine, x, y)
        seen += [scale_is_exhausted(engine), step_within(engine).norm, engine.was_step_applied()]
    scaler.min_scale = floor
    return [*seen, scale_is_exhausted(engine)]


def run_cases() -> dict[str, dict[str, Any]]:
    """Results of each case on this rank."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    return {str(case): run_case(case) for case in CASES}


@pytest.mark.parametrize("world_size", [1, 2])
def test_limits_decide_alike_on_all_ranks(world_size: int) -> None:
    for results in run_ranks(world_size, run_cases):
        assert len(results) == len(CASES)
        for case, result in results.items():
            for name in ("free", "wide", "low loss"):
                norm, expected, moved, applied = result[name]
                assert norm == pytest.approx(expected, rel=1e-3), (case, name)
                assert moved and applied, (case, name)
            for name in ("narrow", "drop", "high loss", "nan loss"):
                norm, expected, moved, applied = result[name]
                assert norm == pytest.approx(expected, rel=1e-3), (case, name)
                assert not moved and not applied, (case, name)
            norm, _, moved, applied = result["nan"]
            assert not math.isfinite(norm) and not moved and not applied, case
            assert result["count"] == 3, case
            *losses, last = result["losses"]
            assert losses == [0.0] * 5 + [6.0 / world_size] * 2 and math.isnan(last), case
            if "fp16" in case:
                assert result["exhausted"] == [True, math.inf, False] * 2 + [False], case


class Scaled:
    """What is asked of an engine and of DeepSpeed's scaler in it."""

    def __init__(self, *, fp16: bool, **scaler: Any) -> None:
        self.optimizer = SimpleNamespace(loss_scaler=SimpleNamespace(**scaler))
        self.fp16_enabled = lambda: fp16


@pytest.mark.parametrize(
    ("engine", "exhausted"),
    [
        (Scaled(fp16=False), False),
        (Scaled(fp16=True, dynamic=False), True),  # a fixed scale never shrinks
        (Scaled(fp16=True, dynamic=True, cur_scale=2, min_scale=1, delayed_shift=1), False),
        (Scaled(fp16=True, dynamic=True, cur_scale=1, min_scale=1, delayed_shift=1), True),
        (
            Scaled(
                fp16=True, dynamic=True, cur_scale=1, min_scale=1, delayed_shift=2, cur_hysteresis=2
            ),
            False,
        ),
    ],
)
def test_which_overflows_a_smaller_scale_cures(engine: Any, exhausted: bool) -> None:
    assert scale_is_exhausted(engine) is exhausted
