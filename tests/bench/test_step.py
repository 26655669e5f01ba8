"""The step's benchmark: its list of variants, and that each of them computes the same loss."""

from dataclasses import replace

import pytest
import torch

from mocov3_ds.bench import step
from mocov3_ds.model.moco import Chunks, EncoderShape
from mocov3_ds.model.vit import VitShape
from tests.ranks_pool import run_ranks

OPTIONS = step.Options(batch=8, chunks=(2, 3))


def test_variants_come_in_the_order_of_the_options() -> None:
    names = [variant.name for variant in step.wanted(OPTIONS)]
    assert names == [
        *("one pass", "blocks recomputed", "chunks of 2", "chunks of 3"),
        *("chunks of 3, 2 more kept", "plain"),
    ]
    only = step.wanted(replace(OPTIONS, variants=("chunks",), chunks=(16,)))
    assert [variant.chunks for variant in only] == [Chunks(size=16)]


def losses() -> list[float]:
    step.PAPER_SHAPES = {"vit_s16": VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3)}
    step.EncoderShape = small
    steps = step.prepare(OPTIONS, step.wanted(OPTIONS), torch.device("cpu"))
    return [run() for run in steps.values()]


def small(vit: VitShape) -> EncoderShape:
    return EncoderShape(vit=vit, hidden=32, out=16)


def test_all_variants_and_the_yardstick_compute_one_loss() -> None:
    [found] = run_ranks(1, losses)
    assert found == pytest.approx([found[0]] * 6, rel=1e-5)  # fp32, other orders of summation
