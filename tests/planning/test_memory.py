"""Planned bytes against tensors that real engines hold, and the moments by hand."""

import dataclasses
import gc
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from mocov3_ds.model.base_encoder import Chunks, EncoderShape
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape
from mocov3_ds.planning import architecture, memory
from mocov3_ds.planning.memory import Memory
from tests.engines import begin
from tests.ranks_pool import run_ranks

SHAPE = EncoderShape(
    vit=VitShape(image_size=16, patch_size=8, dim=132, depth=4, heads=3), hidden=301, out=66
)
BATCH, BUCKET, PERSISTENCE = 12, 30_000, 2_000
CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("bf16", "fp32")]


def storages() -> dict[int, int]:
    """Address -> bytes of each tensor that lives in this process."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects that warn when they are looked at
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def zero(stage: int, bucket: int) -> dict[str, int]:
    return {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "stage3_param_persistence_threshold": PERSISTENCE,
    }


def held(cases: list[tuple[int, str]]) -> list[int]:
    """Bytes of tensors between two steps, of each case."""
    from mocov3_ds.distributed import ranks
    from mocov3_ds.training.step import train_step

    found = []
    for stage, precision in cases:
        before = set(storages())
        engine, encoder, dtype = begin(
            SHAPE, zero(stage, BUCKET), precision=precision, batch=BATCH, chunks=Chunks(size=2)
        )
        rows = BATCH // ranks.world_size()
        for _ in range(2):
            x = torch.randn(rows, 3, 16, 16, dtype=dtype)
            train_step(engine, encoder, x, x.flip(3), momentum=0.9)
        del x
        found.append(sum(size for address, size in storages().items() if address not in before))
        engine.destroy()
        del engine, encoder
    return found


# wide enough that activations, gradients and heads each come to be the largest part
LARGER = EncoderShape(
    vit=VitShape(image_size=64, patch_size=8, dim=192, depth=6, heads=3), hidden=1401, out=96
)
HALF_OF_THE_GRADIENT = 2_900_000
WAYS = [
    ("fp32", 4, Chunks(), False),
    ("fp32", 16, Chunks(), False),
    ("fp32", 16, Chunks(size=4, kept=5), False),
    ("fp32", 16, Chunks(size=8), True),
    ("fp32", 16, Chunks(), True),
    # few and small: a processor that cannot multiply bf16 takes five times as long for it
    ("bf16", 4, Chunks(), False),
    ("bf16", 8, Chunks(size=4, kept=2), False),
]


def any_rank(mine: bool) -> bool:
    from mocov3_ds.distributed import ranks

    return bool(ranks.all_reduce_max(torch.tensor(float(mine))))


def peaks(cases: list[tuple[int, str, int, Chunks, bool]]) -> list[float]:
    """Most bytes that tensors made in a step hold at once, of each case."""
    from mocov3_ds.bench.planned import peak_of_tensors
    from mocov3_ds.distributed import ranks
    from mocov3_ds.model import cpu_ops
    from mocov3_ds.training.step import train_step

    cpu_ops.SMALLEST = 2**40  # torch's own layers, as on a GPU: a gradient is copied once more
    found = []
    for stage, precision, images, chunks, recomputed in cases:
        engine, encoder, dtype = begin(
            LARGER,
            zero(stage, HALF_OF_THE_GRADIENT),
            precision=precision,
            batch=images * ranks.world_size(),
            chunks=chunks,
        )
        engine.module.base.backbone.set_grad_checkpointing(recomputed)
        x1, x2 = (torch.randn(images, 3, 64, 64, dtype=dtype) for _ in range(2))
        step = partial(train_step, engine, encoder, x1, x2, momentum=0.9)
        step()
        seen = sorted(peak_of_tensors(step) for _ in range(2))
        # now and then gloo's thread is the last to let go of a bucket, which the count then misses;
        # a rank that repeats its step alone would wait for ever
        while any_rank(seen[1] > 1.01 * seen[0]) and len(seen) < 8:
            seen = sorted([*seen, peak_of_tensors(step)])
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
        (1, [(stage, *way) for stage in (0, 2) for way in WAYS]),  # stage 1 is as 0 there
        pytest.param(2, ON_TWO_RANKS, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_step_is_that_of_real_engines(
    world_size: int, cases: list[tuple[int, str, int, Chunks, bool]]
) -> None:
    real = run_ranks(world_size, peaks, cases, timeout=900)[0]
    for (stage, precision, images, chunks, recomputed), step in zip(cases, real, strict=True):
        plan = memory.of_a_rank(
            LARGER,
            stage=stage,
            world_size=world_size,
            batch=images * world_size,
            size=4 if precision == "fp32" else 2,
            chunks=chunks,
            recompute_blocks=recomputed,
            persistence=PERSISTENCE,
            bucket=HALF_OF_THE_GRADIENT,
        )
        case = (stage, precision, images, chunks, recomputed, plan.peak)
        assert plan.total == pytest.approx(plan.between_steps + step, rel=WITHIN[stage]), case


def planned(stage: int, precision: str, world_size: int) -> float:
    """Bytes that stay from step to step, without the images."""
    found = memory.of_a_rank(
        SHAPE,
        stage=stage,
        world_size=world_size,
        batch=BATCH,
        size=4 if precision == "fp32" else 2,
        chunks=Chunks(size=2),
        persistence=PERSISTENCE,
        bucket=BUCKET,
    )
    images = sum(part.bytes for part in found.parts if part.name == "views of the images")
    return found.between_steps - images


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_gradients_and_states_are_those_of_real_engines(world_size: int) -> None:
    real = run_ranks(world_size, held, CASES, timeout=600)[0]
    for (stage, precision), size in zip(CASES, real, strict=True):
        ours = planned(stage, precision, world_size)
        assert ours == pytest.approx(size, rel=0.02), (stage, precision)


def of_vit_b(**changes: Any) -> Memory:
    given: dict[str, Any] = {
        "stage": 1,
        "world_size": 8,
        "batch": 4096,
        "size": 2,
        "chunks": Chunks(size=32),
    }
    return memory.of_a_rank(EncoderShape(vit=PAPER_SHAPES["vit_b16"]), **(given | changes))


def parts(found: Memory) -> dict[str, float]:
    return {part.name: part.bytes for part in found.parts}


def test_moments_by_hand() -> None:
    shape = EncoderShape(vit=PAPER_SHAPES["vit_b16"])
    image, trained = architecture.backbone_bytes(shape, 2), architecture.trained(shape)
    whole = parts(of_vit_b(chunks=Chunks()))
    assert whole["activations of one chunk"] == 512 * image
    assert whole["activations of kept chunks"] == 512 * image  # the other view
    assert whole["kept chunks that remain"] == 0  # one view is left when the gradient is whole
    chunks = parts(of_vit_b())
    assert chunks["activations of one chunk"] == 32 * image
    assert chunks["activations of kept chunks"] == chunks["kept chunks that remain"] == 0
    kept = parts(of_vit_b(chunks=Chunks(size=32, kept=3)))
    assert kept["activations of kept chunks"] == 3 * 32 * image
    assert kept["kept chunks that remain"] == 2 * 32 * image
    assert kept["gradient"] == 2 * trained
    assert kept["fp32 master weights"] == 4 * trained / 8
    assert parts(of_vit_b(stage=0))["optimizer's moments"] == 8 * trained
    assert parts(of_vit_b(moments=1))["optimizer's moments"] == 4 * trained / 8
    assert parts(of_vit_b(size=4))["momentum encoder, copy"] == 0
    assert parts(of_vit_b(key_block=64))["logits"] == 4 * 4 * 512 * 64


def test_the_peak_is_the_largest_moment() -> None:
    for chunks in (Chunks(), Chunks(size=8), Chunks(size=8, kept=5)):
        found = of_vit_b(chunks=chunks)
        assert found.total == max(found.at(moment) for moment in memory.MOMENTS)
        assert found.total >= found.between_steps
    # a chunk of one image leaves the gradient as what matters, beside a bucket of it
    one = of_vit_b(chunks=Chunks(size=1))
    assert one.peak == "middle"
    written = of_vit_b(chunks=Chunks(size=1), on_demand=True)
    bucket = 2 * memory.BUCKET
    assert one.at("middle") - written.at("middle") == bucket  # the gradient moves into it
    assert written.at("reduce") == one.at("reduce")
    assert of_vit_b(chunks=Chunks()).peak == "keys"


def test_memory_falls_with_ranks_chunks_and_recomputed_blocks() -> None:
    for change in ({"world_size": 16}, {"chunks": Chunks(size=16)}, {"recompute_blocks": True}):
        assert of_vit_b(**change).total < of_vit_b().total
    deeper = dataclasses.replace(PAPER_SHAPES["vit_b16"], depth=24)
    assert (
        memory.of_a_rank(
            EncoderShape(vit=deeper),
            stage=1,
            world_size=8,
            batch=4096,
            size=2,
            chunks=Chunks(size=32),
        ).total
        > 1.5 * of_vit_b().total
    )
