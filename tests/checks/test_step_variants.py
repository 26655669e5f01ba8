"""Chunks are one pass and compiled blocks the written ones; a difference is found."""

from unittest import mock

import pytest
import torch

from mocov3_ds.checks import step_variants
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.training.step import QueriesToLoss
from tests.ranks_pool import run_ranks


def chunk_statuses() -> list[str]:
    def halve_instead(module: QueriesToLoss, chunks: Chunks) -> None:
        module.base.projector.get_parameter("0.weight").data.mul_(0.5)

    device = torch.device("cpu")
    sound = step_variants.check_chunks(device)
    with mock.patch.object(step_variants, "_set_chunks", halve_instead):
        return [sound.status, step_variants.check_chunks(device).status]


@pytest.mark.slow
def test_chunks_are_one_pass() -> None:
    assert run_ranks(1, chunk_statuses) == [["pass", "fail"]]


def compiled_status() -> str:
    return step_variants.check_compiled(torch.device("cpu")).status


@pytest.mark.slow
def test_compiled_blocks_are_the_written_ones() -> None:
    assert run_ranks(1, compiled_status) == ["pass"]
