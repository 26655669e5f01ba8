"""Muon's exchange in real runs beside what is planned: calls and numbers of the busiest rank."""

from dataclasses import replace

import pytest

from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.shapes import PAPER_SHAPES, EncoderShape
from mocov3_ds.optim import AdamW, Muon
from mocov3_ds.optim.orthogonal import count_operations
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.planning.traffic import plan_collectives
from mocov3_ds.planning.whole_matrices import MatrixWork, plan_matrices
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
