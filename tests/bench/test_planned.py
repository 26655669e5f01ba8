"""Planned against measured: cells are read, tensors are counted, and a tiny plan holds."""

import pytest
import torch

from mocov3_ds.bench import planned
from mocov3_ds.model.chunking import Chunks


def test_cells() -> None:
    cell = planned.read_cell("vit_b16:512:64:4:1")
    assert (cell.recipe, cell.images, cell.chunks) == ("vit_b16", 8, Chunks(size=4, keep=1))
    for text in ("vit_b16:512:64:4", "vit_x16:512:64:4:0", "vit_b16:512:60:4:0", "vit_b16:a:1:1:1"):
        with pytest.raises(ValueError, match=f"{text!r} is not RECIPE:BATCH:RANKS:CHUNK:KEPT"):
            planned.read_cell(text)


def test_the_peak_of_tensors_is_counted() -> None:
    def work() -> None:
        first = torch.ones(1_000_000)
        del first
        both = [torch.ones(500_000), torch.ones(700_000)]
        del both

    assert planned.peak_tensor_bytes(work) == pytest.approx(4 * 1_200_000, rel=0.01)


def test_a_tiny_rank_needs_about_what_is_planned() -> None:
    cell = planned.read_cell("tiny:256:32:0:0")
    measured = planned.measure_in_process(planned._tensor_gib, cell)
    assert measured == pytest.approx(planned.planned_gib(cell, on_demand=False), rel=0.3)
