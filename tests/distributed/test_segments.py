"""Segments cover each tensor exactly once, whatever the cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mocov3_ds.distributed.segments import (
    Flat,
    Segment,
    cut_segments,
    packed_offsets,
    view_bits,
    whole_flat,
)

SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6)


@given(shapes=SHAPES, world_size=st.integers(1, 5), alignment=st.integers(1, 4))
def test_an_even_cut_covers_each_element_once(
    shapes: list[tuple[int, ...]], world_size: int, alignment: int
) -> None:
    names = [f"t{i}" for i in range(len(shapes))]
    offsets, end = [], 0
    for shape in shapes:
        offsets.append(end)
        end += math.ceil(math.prod(shape) / alignment) * alignment
    size = math.ceil(end / world_size)
    concatenation = torch.full((size * world_size,), -1.0)
    tensors = {}
    for name, shape, offset in zip(names, shapes, offsets, strict=True):
        tensors[name] = torch.arange(math.prod(shape)) + 1000.0 * offset
        concatenation[offset : offset + math.prod(shape)] = tensors[name]
    seen = {name: torch.zeros(len(tensors[name])) for name in names}
    for rank in range(world_size):
        low = rank * size
        elements = concatenation[low : low + size].clone()
        segments = cut_segments(names, shapes, offsets, low, low + size)
        flat = Flat(elements, tuple(names), tuple(shapes), segments, sharded=True)
        assert all(segment.length > 0 for segment in flat.segments)
        for segment in flat.segments:
            piece = slice(segment.start, segment.start + segment.length)
            assert torch.equal(segment.of(flat.view()), tensors[segment.name][piece])
            assert flat.names[segment.index] == segment.name
            seen[segment.name][piece] += 1
        flat.clear_gaps()
        assert not (elements == -1).any()  # padding is zero ...
        gaps = sum(end - first for first, end in flat.gaps())
        assert gaps + sum(flat.covered()) == size
    assert all((count == 1).all() for count in seen.values())  # ... and nothing else is


def test_packed_offsets_leave_no_gap() -> None:
    assert packed_offsets([(2, 3), (), (4,)]) == [0, 6, 7]


def test_a_rank_of_padding_has_no_segment() -> None:
    segments = cut_segments(["a"], [(3,)], [0], 4, 8)
    flat = Flat(torch.full((4,), torch.nan), ("a",), ((3,),), segments, sharded=True)
    assert flat.segments == ()
    assert list(flat.gaps()) == [(0, 4)]
    flat.clear_gaps()
    assert torch.equal(flat.tensor, torch.zeros(4))


def test_a_whole_tensor_is_one_segment() -> None:
    flat = whole_flat("w", torch.zeros(2, 3))
    assert flat.segments == (Segment("w", 0, 0, 6, 0),)
    assert list(flat.gaps()) == []
    assert whole_flat("scalar", torch.zeros(())).segments[0].length == 1


def test_a_transposed_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="'w' is not contiguous"):
        whole_flat("w", torch.zeros(2, 3).T)


def test_viewed_bits_keep_what_sums_of_floats_lose() -> None:
    x = torch.tensor([-0.0, torch.nan, 1e-42, -torch.inf])
    total = view_bits(x) + view_bits(torch.zeros(4))
    assert torch.equal(total, x.view(torch.int32))
