"""The norm that is computed here makes the same steps and skips as DeepSpeed's own, bit for bit."""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocov3_ds.distributed.gradient_norm import speed_up_norm, square_sum
from mocov3_ds.distributed.zero import read_loss_scale
from tests.optim import engines
from tests.optim.engines import Case
from tests.ranks_pool import run_ranks

CASES = [
    Case(1, clip=0.01),
    Case(1, "bf16"),
    Case(1, "fp16", clip=0.01),
    Case(2, "bf16", clip=0.01),
    Case(2, "fp16"),
    Case(3, clip=0.01),
    Case(3, "bf16"),
    Case(3, "fp16", clip=0.01),
]
POISONS = {"first": 0.0, "nan": math.nan, "between": 0.0, "inf": math.inf, "last": 0.0}


def test_square_sum_is_that_of_all_numbers_in_fp64() -> None:
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0]]).bfloat16(), torch.zeros(7)]
    assert float(square_sum(tensors)) == pytest.approx(169.0, rel=1e-12)
    assert square_sum(tensors).dtype == torch.float64
    assert float(square_sum([])) == 0.0
    assert float(square_sum([torch.tensor([3e38])])) == pytest.approx(9e76, rel=1e-6)
    for bad in (math.inf, -math.inf, math.nan):
        assert not math.isfinite(square_sum([torch.ones(5), torch.tensor([1.0, bad])]))


class DeepSpeedZeroOptimizer(SimpleNamespace):
    """What is asked of DeepSpeed's wrapper of the same name."""


def test_other_wrappers_and_offload_stay_as_they_are() -> None:
    for wrapper in (
        SimpleNamespace(dp_process_group=None),
        DeepSpeedZeroOptimizer(dp_process_group=None, cpu_offload=True),
    ):
        speed_up_norm(wrapper)
        assert not hasattr(wrapper, "has_overflow"), wrapper
    wrapper = DeepSpeedZeroOptimizer(dp_process_group=None, cpu_offload=False)
    speed_up_norm(wrapper)
    norm = wrapper.get_grad_norm_direct([torch.tensor([3.0, 4.0])], [None])
    assert norm == 5.0 and norm.dtype == torch.float32
    assert wrapper.has_overflow(partition_gradients=True) is False


def poison_gradient(parameter: torch.nn.Parameter, value: float) -> None:
    """Make some numbers of a parameter's next gradient a value that is not finite."""
    if not value:
        return

    def replace(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        poisoned = gradient.clone()
        poisoned.view(-1)[1::3] = value
        return poisoned

    handle = parameter.register_hook(replace)


def run_case(case: Case, *, fast: bool) -> list[Any]:
    """What DeepSpeed's own step did with a series of gradients: norm, skip, scale, weights."""
    engine, optimizer = engines.start(case)
    if fast:
        speed_up_norm(engine.optimizer)
    parameters = dict(engine.module.named_parameters())
    seen: list[Any] = []
    batches = engines.batches(case, len(POISONS))
    for value, ((x, y),) in zip(POISONS.values(), batches, strict=True):
        poison_gradient(parameters["out.weight"], value)
        engines.backward(engine, x, y)
        engine.step()
        weights = {name: w.clone() for name, w in engines.weights(optimizer).items()}
        norm = float(engine.get_global_grad_norm())
        seen.append((norm, engine.was_step_applied(), read_loss_scale(engine), weights))
    engines.stop(engine)
    return seen


def run_cases() -> dict[str, tuple[list[Any], list[Any]]]:
    """Each case by DeepSpeed's own norm and by ours, on this rank."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    return {str(case): (run_case(case, fast=False), run_case(case, fast=True)) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_and_skips_are_those_of_deepspeed(world_size: int) -> None:
    for results in run_ranks(world_size, run_cases):
        assert len(results) == len(CASES)
        for case, (theirs, ours) in results.items():
            for poison, their_step, our_step in zip(POISONS, theirs, ours, strict=True):
                assert our_step[:3] == their_step[:3], (case, poison)
                assert our_step[1] == (not POISONS[poison]), (case, poison)
                assert our_step[3].keys() == their_step[3].keys()
                for name, weight in our_step[3].items():
                    assert torch.equal(weight, their_step[3][name]), (case, poison, name)
