"""The step's benchmark: its list of variants, and that each of them computes the same loss."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mocov3_ds.bench import step
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape
from tests.ranks_pool import run_ranks

TINY = VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3)
SMALL = EncoderShape(backbone=TINY, hidden=32, out=16)
OPTIONS = step.StepOptions(
    batch=8,
    chunks=(2, 3),
    variants=("direct", "joint", "channels_last", "blocks", "chunks", "plain"),
)


def test_variants_come_in_the_order_of_the_options() -> None:
    names = [variant.name for variant in step.list_variants(OPTIONS)]
    assert names == [
        *("one pass", "one pass of both views", "one pass, channels last", "blocks recomputed"),
        *("chunks of 2", "chunks of 3"),
        *("chunks of 3, 2 more kept", "plain"),
    ]


def kept_of_two_ranks() -> list[Chunks]:
    options = replace(OPTIONS, batch=16, variants=("chunks",), chunks=(2, 8, 16))
    return [variant.chunks for variant in step.list_variants(options)]


def test_chunks_are_of_a_ranks_batch() -> None:
    # 8 images of two views: 8 chunks of 2, half of them kept; those of 8 and 16 are one pass
    for found in run_ranks(2, kept_of_two_ranks):
        assert found == [Chunks(size=2), Chunks(size=2, keep=3)]
    with pytest.raises(ValueError, match="smaller than the 8 images of a rank"):
        step.compare_variants(SMALL, replace(OPTIONS, variants=("chunks",), chunks=(8,)))


@pytest.mark.slow
def test_one_variant_after_another_under_torchrun() -> None:
    # processes of the second variant must not find the addresses of the first
    launcher = Path(sys.executable).with_name("torchrun")
    options = ["--batch", "4", "--variants", "direct", "blocks", "--repeats", "1", "--warmup", "0"]
    done = subprocess.run(
        [launcher, "--nproc-per-node", "2", "-m", "mocov3_ds.bench", "step", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| variant", "| one pass", "| blocks recomputed"]
    assert all(float(row[4]) > 0 for row in rows[1:])


def losses() -> list[float]:
    variants = step.list_variants(OPTIONS)
    steps = step.build_steps(SMALL, OPTIONS, variants, torch.device("cpu"))
    return [run() for run in steps.values()]


def test_all_variants_and_the_yardstick_compute_one_loss() -> None:
    [found] = run_ranks(1, losses)
    assert found == pytest.approx([found[0]] * 8, rel=1e-5)  # fp32, other orders of summation


def test_the_yardstick_of_two_ranks_computes_it_too() -> None:
    first, second = run_ranks(2, losses)
    assert first == second == pytest.approx([first[0]] * 8, rel=1e-5)


def test_operations_are_those_of_the_paper() -> None:
    # Table 2 counts multiply-adds
    counted = [step.forward_flops(shape) / 2e9 for shape in PAPER_SHAPES.values()]
    assert counted == pytest.approx([4.6, 17.5, 61.3, 166.7], rel=5e-3)


def test_the_rate_counts_four_products() -> None:
    def in_two_seconds(multiply: Callable[[], object], device: torch.device) -> float:
        multiply()
        return 2.0

    rate = step.matrix_rate(TINY, 8, "fp32", torch.device("cpu"), in_two_seconds)
    # 8 images of 5 tokens through 24 x 72, 24 x 24, 24 x 96 and 96 x 24, in two seconds
    assert rate == 2 * 8 * 5 * 24 * (72 + 24 + 96 + 96) / 2


def print_table() -> str:
    options = replace(OPTIONS, variants=("direct", "plain"), repeats=1, warmup=0, memory=False)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        step.compare_variants(SMALL, options)
    return printed.getvalue()


def test_the_table_has_a_row_for_each_variant() -> None:
    [printed] = run_ranks(1, print_table)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["variant", "one pass", "plain"]
    assert [len(row) for row in rows] == [7, 7, 7]
    assert float(rows[2][3]) == 1  # the yardstick's own speed
