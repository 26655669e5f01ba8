"""Muon's exchange in real runs beside what is planned: calls and numbers of the busiest rank."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.shapes import PAPER_SHAPES, EncoderShape
from mocov3_ds.optim import AdamW, Muon
from mocov3_ds.optim.orthogonal import count_operations
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.memory import plan_memory
from mocov3_ds.planning.options import list_setups
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.planning.traffic import plan_collectives
from mocov3_ds.planning.whole_matrices import (
    MatrixWork,
    count_moments,
    matrix_params,
    plan_matrices,
)
from tests.engines import start_encoders
from tests.planning.test_traffic import BATCH, SHAPE, Case, counted
from tests.ranks_pool import run_ranks

SETUP = StepSetup(
    shape=SHAPE,
    stage=1,
    world_size=2,
    batch=BATCH,
    precision="fp32",
    chunks=Chunks(),
    optimizer=Muon,
)


def check_counted(world_size: int, stages: tuple[int, ...]) -> None:
    cases: list[Case] = [(stage, "fp32", "Muon", 0, False, {}) for stage in stages]
    for stage, *ranks in zip(stages, *run_ranks(world_size, counted, cases), strict=True):
        calls = [[c for c in rank if c.operation == "all_to_all_single"] for rank in ranks]
        planned = plan_matrices(replace(SETUP, stage=stage, world_size=world_size))
        assert {len(of_rank) for of_rank in calls} == {planned.exchanges}, stage
        numbers = max(sum(c.elements for c in of_rank) for of_rank in calls)
        assert numbers == planned.numbers, stage
        assert {c.dtype for of_rank in calls for c in of_rank} <= {"float32"}  # bf16 on cards
        assert bool(stage) == bool(planned.numbers)


def test_planned_numbers_equal_counted_ones() -> None:
    check_counted(2, (0, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_planned_numbers_equal_counted_ones_on_more_ranks(world_size: int) -> None:
    check_counted(world_size, (1, 2, 3))


def held(stages: tuple[int, ...]) -> list[float]:
    """Most bytes that the work on whole matrices holds at once on this rank, at each stage.

    The least of several steps: gloo's thread lets go of what it has sent a moment after the rank
    goes on, at times later than the next allocation.
    """
    from mocov3_ds.bench.planned import peak_tensor_bytes
    from mocov3_ds.distributed import ranks
    from mocov3_ds.training.step import train_step

    least: list[float] = []
    for stage in stages:
        peaks: list[float] = []
        engine, encoder, _ = start_encoders(
            *(SHAPE, {"stage": stage}),
            precision="fp32",
            batch=BATCH,
            chunks=Chunks(),
            optimizer="Muon",
        )
        optimizer = engine.optimizer.optimizer

        def measure(finish: Any, *args: Any, peaks: list[float] = peaks) -> None:
            peaks.append(peak_tensor_bytes(partial(finish, *args)))

        optimizer.finish_directions = partial(measure, optimizer.finish_directions)
        x = torch.randn(BATCH // ranks.world_size(), 3, 16, 16)
        for _ in range(4):
            train_step(engine, encoder, x, x.flip(3), momentum=0.9)
        engine.destroy()
        least.append(min(peaks))
    return least


@pytest.mark.slow
def test_planned_memory_of_the_work_is_what_it_holds() -> None:
    stages = (1, 3)
    for stage, *of_ranks in zip(stages, *run_ranks(2, held, stages), strict=True):
        planned = plan_matrices(replace(SETUP, stage=stage))
        assert max(of_ranks) == pytest.approx(4 * planned.memory, rel=0.1), stage


def test_options_count() -> None:
    large = replace(SETUP, shape=EncoderShape(backbone=PAPER_SHAPES["vit_s16"]), stage=0)

    def plan(**params: Any) -> MatrixWork:
        return plan_matrices(replace(large, optimizer_params=matrix_params({"lr": 1.0, **params})))

    usual = plan()
    assert plan(ns_steps=10).operations == 2 * usual.operations
    last = count_operations(256, 4096, steps=5)
    assert plan(last_layer="muon").operations == usual.operations + last
    for qkv, blocks in (("thirds", 3), ("heads", 36)):
        whole = count_operations(3 * 384, 384, steps=5)
        cut = count_operations(3 * 384, 384, steps=5, blocks=blocks)
        assert plan(qkv=qkv).operations == usual.operations + 12 * (cut - whole), qkv
    single = replace(large, stage=1, optimizer_params=matrix_params({"ns_dtype": "fp32"}))
    exact = {c.purpose: c for c in plan_collectives(single)}["whole matrices"]
    rounded = {c.purpose: c for c in plan_collectives(replace(single, optimizer_params=()))}
    assert exact.payload == 2 * rounded["whole matrices"].payload
    with pytest.raises(ValueError, match="convolutions 'muon' has no effect"):
        plan(convolutions="muon")  # the patch projection is frozen


def test_memory_of_the_work_is_an_item() -> None:
    items = {item.name: item for item in plan_memory(SETUP).items}
    assert items["whole matrices at work"].bytes == plan_matrices(SETUP).memory_bytes > 0
    assert items["whole matrices at work"].alive == ("update",)
    others = {item.name: item for item in plan_memory(replace(SETUP, optimizer=AdamW)).items}
    assert others["whole matrices at work"].bytes == 0


def test_what_auto_means_depends_on_the_device() -> None:
    on_cpu, on_card = plan_matrices(replace(SETUP, device="cpu")), plan_matrices(SETUP)
    assert (on_cpu.dtype, on_card.dtype) == ("float32", "bfloat16")
    assert on_cpu.memory_bytes == 2 * on_card.memory_bytes
    planned = plan_run("vit_s16", overrides=("optimizer.type=Muon", "bf16.enabled=false"))
    for gpus, device in (("1xcpu", "cpu"), ("1xA100", "cuda")):
        assert {s.device for s in list_setups(planned, read_cluster(gpus), (1,))} == {device}


def test_whole_matrices_have_one_moment() -> None:
    """At stage 0, of the real optimizer's state; a flat that is cut has place for two."""
    encoder = BaseEncoder(SHAPE)
    named = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    optimizer = Muon(named, lr=1.0)
    optimizer.attach()
    states = optimizer.state.values()
    held = sum(state[key].nbytes for state in states for key in Muon.moments if key in state)
    trained = sum(parameter.numel() for _, parameter in named)
    assert held < 0.6 * 8 * trained

    def planned(setup: StepSetup) -> float:
        items = {item.name: item.bytes for item in plan_memory(setup).items}
        return items["optimizer's moments"]

    assert planned(replace(SETUP, stage=0)) == held == 4 * count_moments(Muon, SHAPE)
    assert planned(SETUP) == 8 * trained / 2  # of two ranks
    last = dict(named)["predictor.3.weight"].numel()
    less = replace(SETUP, stage=0, optimizer_params=matrix_params({"last_layer": "muon"}))
    assert planned(less) == held - 4 * last
    assert count_moments(AdamW, SHAPE) == 2 * trained


def test_on_paper() -> None:
    assert plan_matrices(replace(SETUP, optimizer=AdamW)) == MatrixWork()
    large = replace(SETUP, shape=EncoderShape(backbone=PAPER_SHAPES["vit_b16"]), world_size=8)
    whole, cut = plan_matrices(replace(large, stage=0)), plan_matrices(large)
    assert not whole.exchanges
    # the owners share the work; more than half of it is the projector's matrix of 4096 x 4096
    share, largest = whole.operations / 8, count_operations(4096, 4096, steps=5)
    assert share <= cut.operations <= max(1.1 * share, largest)
    shards = plan_matrices(replace(large, stage=3))
    # stage 3 cuts each matrix; stages 1 and 2 leave most of them whole on one rank
    assert cut.numbers < shards.numbers / 2
    (sent,) = [c for c in plan_collectives(large) if c.operation == "all_to_all_single"]
    assert sent.payload == 2 * cut.numbers == sent.wire_bytes(8)
