"""Tensors and gradients of an engine by name, whole on each rank, at each ZeRO stage."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import (
    check_precision,
    full_tensors,
    gradient_bytes,
    release_engine,
    start_engine,
)
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.distributed.gradients import full_gradients
from mocov3_ds.optim import AdamW
from tests.optim import engines, plain
from tests.optim.engines import BATCH, Case
from tests.ranks_pool import run_ranks


def read_engines(stages: list[int]) -> list[dict[str, Any]]:
    """Tensors, gradients and foretold bytes of an engine of each stage, on this rank."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engines.quiet()
    results = []
    for stage in stages:
        model = plain.odd_model()
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config = engine_config(
            {"zero_optimization": {"stage": stage} | zero},
            global_batch=BATCH,
            world_size=ranks.world_size(),
        )
        engine = start_engine(model, AdamW(model.named_parameters()), config)
        tensors = dict(full_tensors(engine.module))
        ((x, y),) = next(engines.batches(Case(stage), 1))
        engines.backward(engine, x, y)
        gradients = {name: g.clone() for name, g in full_gradients(engine.module)}
        results.append(
            {"tensors": tensors, "gradients": gradients, "bytes": gradient_bytes(engine)}
        )
        engine.step()
        engines.stop(engine)
    return results


def read_between_steps() -> list[dict[str, int]]:
    """Numbers of each weight that lie here at stage 3, before and after all were read whole."""
    warnings.filterwarnings("ignore")
    engines.quiet()
    model = plain.odd_model()
    config = engine_config(
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30}},
        global_batch=BATCH,
        world_size=ranks.world_size(),
    )
    engine = start_engine(model, AdamW(model.named_parameters()), config)
    ((x, y),) = next(engines.batches(Case(3), 1))
    engines.backward(engine, x, y)
    engine.step()
    found = [{n: p.numel() for n, p in engine.module.named_parameters()}]
    assert all(tensor.numel() for _, tensor in full_tensors(engine.module))
    found.append({n: p.numel() for n, p in engine.module.named_parameters()})
    engines.stop(engine)
    return found


def test_reading_leaves_weights_cut_or_whole_as_they_were() -> None:
    [(before, after)] = run_ranks(1, read_between_steps)
    assert before == after
    assert {number > 0 for number in before.values()} == {False, True}


def plain_gradients() -> dict[str, Tensor]:
    """Gradients of the whole batch in one process."""
    model = plain.odd_model()
    ((x, y),) = next(engines.batches(Case(0), 1))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_tensors_and_gradients_are_whole_at_each_stage(world_size: int) -> None:
    expected, model = plain_gradients(), plain.odd_model()
    numbers = sum(gradient.numel() for gradient in expected.values())
    for results in run_ranks(world_size, read_engines, [0, 1, 2, 3]):
        for stage, result in enumerate(results):
            tensors, gradients = result["tensors"], result["gradients"]
            assert tensors.keys() == model.state_dict().keys(), stage
            assert all(torch.equal(tensors[n], p) for n, p in model.named_parameters()), stage
            assert gradients.keys() == expected.keys(), stage
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
            shards = world_size if stage else 1
            buckets = 2 * 4 * numbers if stage else 0
            assert result["bytes"] == 4 * numbers + 4 * numbers // shards + buckets, stage


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    monkeypatch.setattr(accelerator, "is_bf16_supported", lambda: True)
    check_precision({})
    check_precision({"bf16": {"enabled": True}, "fp16": {"enabled": False}})
    with pytest.raises(ValueError, match=r"fp16 is not for this device .*fp16\.enabled=false"):
        check_precision({"fp16": {"enabled": True}})


def step_and_release(stages: list[int]) -> list[list[bool]]:
    """Whether engine, module, optimizer and wrapper of each stage are still there at the end."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engines.quiet()

    def use_engine(stage: int) -> list[weakref.ref[Any]]:
        model, settings = plain.odd_model(), {"zero_optimization": {"stage": stage}}
        config = engine_config(settings, global_batch=BATCH, world_size=1)
        optimizer = AdamW(model.named_parameters())
        engine = start_engine(model, optimizer, config)
        ((x, y),) = next(engines.batches(Case(stage), 1))
        engines.backward(engine, x, y)
        engine.step()
        release_engine(engine)
        return [weakref.ref(part) for part in (engine, model, optimizer, engine.optimizer)]

    parts = [use_engine(stage) for stage in stages]
    gc.collect()
    return [[part() is not None for part in of_stage] for of_stage in parts]


def test_a_released_engine_leaves_nothing_behind() -> None:
    assert run_ranks(1, step_and_release, [1, 2, 3]) == [[[False] * 4] * 3]
