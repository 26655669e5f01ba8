"""What follows from the layout of a step: images of a rank, bytes of a number, passes."""

import pytest

from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.vit import PAPER_SHAPES
from mocov3_ds.planning.step_setup import PERSISTENCE, Precision, StepSetup


def lay_out(chunks: Chunks, *, precision: Precision = "bf16", recompute: bool = False) -> StepSetup:
    return StepSetup(
        shape=EncoderShape(backbone=PAPER_SHAPES["vit_b16"]),
        stage=1,
        world_size=4,
        batch=32,
        precision=precision,
        chunks=chunks,
        recompute_blocks=recompute,
    )


@pytest.mark.parametrize(
    ("chunk", "kept", "recompute", "passes"),
    [
        (0, 0, False, (2, 0)),
        (0, 0, True, (2, 2)),
        (2, 0, False, (8, 7)),
        (2, 3, False, (8, 4)),
        (2, 0, True, (8, 15)),
    ],
)
def test_passes(chunk: int, kept: int, recompute: bool, passes: tuple[int, int]) -> None:
    setup = lay_out(Chunks(size=chunk, keep=kept), recompute=recompute)
    assert setup.images == 8
    assert (setup.passes.forward, setup.passes.recomputed) == passes


def test_precisions() -> None:
    names: dict[Precision, tuple[int, str]] = {
        "fp32": (4, "float32"),
        "bf16": (2, "bfloat16"),
        "fp16": (2, "float16"),
    }
    for precision, (number_bytes, dtype) in names.items():
        setup = lay_out(Chunks(), precision=precision)
        assert (setup.number_bytes, setup.dtype) == (number_bytes, dtype)


def test_constants_follow_the_product() -> None:
    config = engine_config({"zero_optimization": {"stage": 1}}, global_batch=8, world_size=1)
    assert config["zero_optimization"]["reduce_bucket_size"] == lay_out(Chunks()).bucket
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().param_persistence_threshold == PERSISTENCE
