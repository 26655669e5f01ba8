"""Planned bytes against tensors that real engines hold, and the items by hand."""

import dataclasses
import gc
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape
from mocov3_ds.optim import Lars
from mocov3_ds.planning import architecture
from mocov3_ds.planning.memory import PHASES, Memory, plan_memory
from mocov3_ds.planning.step_setup import Precision, StepSetup
from tests.engines import start_encoders
from tests.ranks_pool import run_ranks

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=132, depth=4, heads=3), hidden=301, out=66
)
BATCH, BUCKET, PERSISTENCE = 12, 30_000, 2_000
_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in _PRECISIONS]


def storages() -> dict[int, torch.UntypedStorage]:
    """Address -> storage of each tensor that lives in this process.

    Whoever keeps what is returned keeps the addresses: none is given to another tensor meanwhile.
    """
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects that warn when they are looked at
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage
    return found


def zero(stage: int, bucket: int) -> dict[str, int]:
    return {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "stage3_param_persistence_threshold": PERSISTENCE,
    }


def held(cases: list[tuple[int, Precision]]) -> list[int]:
    """Bytes of tensors between two steps, of each case."""
    from mocov3_ds.distributed import ranks
    from mocov3_ds.training.step import train_step

    found = []
    for stage, precision in cases:
        before = storages()
        engine, encoder, dtype = start_encoders(
            SHAPE, zero(stage, BUCKET), precision=precision, batch=BATCH, chunks=Chunks(size=2)
        )
        rows = BATCH // ranks.world_size()
        for _ in range(2):
            x = torch.randn(rows, 3, 16, 16, dtype=dtype)
            train_step(engine, encoder, x, x.flip(3), momentum=0.9)
        del x
        made = [kept for address, kept in storages().items() if address not in before]
        found.append(sum(storage.nbytes() for storage in made))
        del before, made
        engine.destroy()
        del engine, encoder
    return found


# wide enough that activations, gradients and heads each come to be the largest part
LARGER = EncoderShape(
    backbone=VitShape(image_size=64, patch_size=8, dim=192, depth=6, heads=3), hidden=1401, out=96
)
HALF_OF_THE_GRADIENT = 2_900_000
WAYS: list[tuple[Precision, int, Chunks, bool]] = [
    ("fp32", 4, Chunks(), False),
    ("fp32", 16, Chunks(), False),
    ("fp32", 16, Chunks(size=4, keep=5), False),
    ("fp32", 16, Chunks(size=8), True),
    ("fp32", 16, Chunks(), True),
    # few and small: a processor that cannot multiply bf16 takes five times as long for it
    ("bf16", 4, Chunks(), False),
    ("bf16", 8, Chunks(size=4, keep=2), False),
]


def any_rank(mine: bool) -> bool:
    from mocov3_ds.distributed import ranks

    return bool(ranks.all_reduce_max(torch.tensor(float(mine))))


def peaks(cases: list[tuple[int, Precision, int, Chunks, bool]]) -> list[float]:
    """Most bytes that tensors made in a step hold at once, of each case."""
    from mocov3_ds.bench.planned import peak_tensor_bytes
    from mocov3_ds.distributed import ranks
    from mocov3_ds.model import cpu_ops
    from mocov3_ds.training.step import train_step

    found = []
    for stage, precision, images, chunks, recomputed in cases:
        engine, encoder, dtype = start_encoders(
            LARGER,
            zero(stage, HALF_OF_THE_GRADIENT),
            precision=precision,
            batch=images * ranks.world_size(),
            chunks=chunks,
        )
        engine.module.base.backbone.set_grad_checkpointing(recomputed)
        for network in (engine.module, encoder):
            for layer in network.modules():
                if type(layer) is cpu_ops.Linear:
                    # torch's own layers, as on a GPU: a gradient is copied once more
                    layer.__class__ = torch.nn.Linear
        x1, x2 = (torch.randn(images, 3, 64, 64, dtype=dtype) for _ in range(2))
        step = partial(train_step, engine, encoder, x1, x2, momentum=0.9)
        step()
        seen = sorted(peak_tensor_bytes(step) for _ in range(2))
        # now and then gloo's thread is the last to let go of a bucket, which the count then misses;
        # a rank that repeats its step alone would wait for ever
        while any_rank(seen[1] > 1.01 * seen[0]) and len(seen) < 8:
            seen = sorted([*seen, peak_tensor_bytes(step)])
        found.append(seen[0])
        engine.destroy()
    return found


# by ZeRO stage: measured 2.4 % at 0 and 1; 6.5 % at 2, which reduces as it goes; 8.6 % at 3, where
# what DeepSpeed gathers when, and twice for a moment, is not the plan's to know
WITHIN = (0.04, 0.04, 0.08, 0.1)
ON_TWO_RANKS = [(0, *way) for way in WAYS[:2]]
ON_TWO_RANKS += [(stage, *way) for stage in (1, 3) for way in WAYS]
ON_TWO_RANKS += [(2, *way) for way in WAYS[::2]]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [(stage, *way) for stage in (0, 2) for way in (WAYS[0], WAYS[2], WAYS[5])]),
        pytest.param(  # stage 1 is as 0 there
            1, [(stage, *way) for stage in (0, 2) for way in WAYS], marks=pytest.mark.slow
        ),
        pytest.param(2, ON_TWO_RANKS, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_step_is_that_of_real_engines(
    world_size: int, cases: list[tuple[int, Precision, int, Chunks, bool]]
) -> None:
    real = run_ranks(world_size, peaks, cases, timeout=900)[0]
    for (stage, precision, images, chunks, recomputed), step in zip(cases, real, strict=True):
        setup = StepSetup(
            shape=LARGER,
            stage=stage,
            world_size=world_size,
            batch=images * world_size,
            precision=precision,
            chunks=chunks,
            recompute_blocks=recomputed,
            persistence=PERSISTENCE,
            bucket=HALF_OF_THE_GRADIENT,
        )
        plan = plan_memory(setup)
        case = (stage, precision, images, chunks, recomputed, plan.peak_phase)
        expected = pytest.approx(plan.bytes_between_steps + step, rel=WITHIN[stage])
        assert plan.peak_bytes == expected, case


def planned(stage: int, precision: Precision, world_size: int) -> float:
    """Bytes that stay from step to step, without the images."""
    setup = StepSetup(
        shape=SHAPE,
        stage=stage,
        world_size=world_size,
        batch=BATCH,
        precision=precision,
        chunks=Chunks(size=2),
        persistence=PERSISTENCE,
        bucket=BUCKET,
    )
    plan = plan_memory(setup)
    return plan.bytes_between_steps - bytes_by_name(plan)["views of the images"]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_gradients_and_states_are_those_of_real_engines(world_size: int) -> None:
    real = run_ranks(world_size, held, CASES, timeout=600)[0]
    for (stage, precision), size in zip(CASES, real, strict=True):
        ours = planned(stage, precision, world_size)
        assert ours == pytest.approx(size, rel=0.02), (stage, precision)


VIT_B = StepSetup(
    shape=EncoderShape(backbone=PAPER_SHAPES["vit_b16"]),
    stage=1,
    world_size=8,
    batch=4096,
    precision="bf16",
    chunks=Chunks(size=32),
)


def plan_vit_b(*, on_demand: bool = False, **changes: Any) -> Memory:
    return plan_memory(dataclasses.replace(VIT_B, **changes), on_demand=on_demand)


def bytes_by_name(plan: Memory) -> dict[str, float]:
    return {item.name: item.bytes for item in plan.items}


def test_items_by_hand() -> None:
    shape = VIT_B.shape
    image, trained = architecture.backbone_bytes(shape, 2), architecture.count_trained(shape)
    one_pass = bytes_by_name(plan_vit_b(chunks=Chunks()))
    assert one_pass["activations of one chunk"] == 512 * image
    assert one_pass["activations of kept chunks"] == 512 * image  # the other view
    assert one_pass["kept chunks that remain"] == 0  # one view is left when the gradient is whole
    chunks = bytes_by_name(plan_vit_b())
    assert chunks["activations of one chunk"] == 32 * image
    assert chunks["activations of kept chunks"] == chunks["kept chunks that remain"] == 0
    three = bytes_by_name(plan_vit_b(chunks=Chunks(size=32, keep=3)))
    assert three["activations of kept chunks"] == 3 * 32 * image
    assert three["kept chunks that remain"] == 2 * 32 * image
    assert three["gradient"] == 2 * trained
    assert three["fp32 master weights"] == 4 * trained / 8
    assert bytes_by_name(plan_vit_b(stage=0))["optimizer's moments"] == 8 * trained
    assert bytes_by_name(plan_vit_b(optimizer=Lars))["optimizer's moments"] == 4 * trained / 8
    assert bytes_by_name(plan_vit_b(precision="fp32"))["momentum encoder, copy"] == 0
    assert bytes_by_name(plan_vit_b(key_block=64))["logits"] == 4 * 4 * 512 * 64


def test_the_peak_is_the_largest_phase() -> None:
    for chunks in (Chunks(), Chunks(size=8), Chunks(size=8, keep=5)):
        plan = plan_vit_b(chunks=chunks)
        assert plan.peak_bytes == max(plan.bytes_in(phase) for phase in PHASES)
        assert plan.peak_bytes >= plan.bytes_between_steps
    # a chunk of one image leaves the gradient as what matters, beside a bucket of it
    one = plan_vit_b(chunks=Chunks(size=1))
    assert one.peak_phase == "middle"
    on_demand = plan_vit_b(chunks=Chunks(size=1), on_demand=True)
    bucket = 2 * VIT_B.bucket
    # the gradient moves into the bucket
    assert one.bytes_in("middle") - on_demand.bytes_in("middle") == bucket
    assert on_demand.bytes_in("reduce") == one.bytes_in("reduce")
    assert plan_vit_b(chunks=Chunks()).peak_phase == "keys"


def test_memory_falls_with_ranks_chunks_and_recomputed_blocks() -> None:
    for change in ({"world_size": 16}, {"chunks": Chunks(size=16)}, {"recompute_blocks": True}):
        assert plan_vit_b(**change).peak_bytes < plan_vit_b().peak_bytes
    deeper = EncoderShape(backbone=dataclasses.replace(PAPER_SHAPES["vit_b16"], depth=24))
    assert plan_vit_b(shape=deeper).peak_bytes > 1.5 * plan_vit_b().peak_bytes
