"""Which slice of which named tensor lies where on this rank: pure description, knows no engine.

ZeRO hands an optimizer one-dimensional fp32 tensors that are cut without regard for parameter
boundaries. `Flat` says what is inside such a tensor, so that whatever must be known per parameter
(norms, trust ratios, weight decay, checkpoints) can be computed segment by segment and summed over
the ranks. `mocov3_ds.distributed.zero` builds the description from a DeepSpeed engine.

Legend: S = tensors of a flat.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A run of elements that belong to one named tensor.

    Attributes:
        name: Name of the tensor in the model.
        index: Position of the name in `Flat.names`, the same on each rank.
        start: First element inside the whole tensor, flattened.
        length: Number of elements, at least 1.
        offset: First element inside the flat tensor of this rank.
    """

    name: str
    index: int
    start: int
    length: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The segment's elements of a flat tensor (a view)."""
        return flat[self.offset : self.offset + self.length]


@dataclass(frozen=True, eq=False)
class Flat:
    """One tensor as the optimizer sees it, with the segments that lie in it on this rank.

    Attributes:
        tensor: fp32 master weights; one-dimensional when sharded.
        names: Every tensor that has elements in this flat on *any* rank of the group, in the same
            order on each of them.
        shapes: Full shapes of these tensors.
        segments: What lies on this rank; empty on a rank that holds padding only.
        sharded: Whether the other elements are on other ranks of `group`.
        group: Process group over which the tensors are cut; means nothing unless `sharded`.
    """

    tensor: Tensor
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    segments: tuple[Segment, ...]
    sharded: bool = False
    group: Any = field(default=None, repr=False)

    def view(self, tensor: Tensor | None = None) -> Tensor:
        """The flat tensor, or a state tensor beside it, as one dimension without a copy."""
        return (self.tensor if tensor is None else tensor).detach().view(-1)

    def covered(self) -> list[int]:
        """Elements of each tensor that are on this rank, (S,)."""
        counts = [0] * len(self.names)
        for segment in self.segments:
            counts[segment.index] += segment.length
        return counts

    def gaps(self) -> Iterator[tuple[int, int]]:
        """First element of each run of padding, and the element after its last."""
        end = 0
        for segment in sorted(self.segments, key=lambda segment: segment.offset):
            if segment.offset > end:
                yield end, segment.offset
            end = segment.offset + segment.length
        if end < self.tensor.numel():
            yield end, self.tensor.numel()

    def clear_gaps(self) -> None:
        """Make the padding zero; ZeRO-3 leaves whatever the allocator returned in it."""
        flat = self.view()
        for first, end in self.gaps():
            flat[first:end] = 0


def full_shape(parameter: Tensor) -> Shape:
    """Shape of the whole tensor, also where ZeRO-3 has already cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_flat(name: str, tensor: Tensor) -> Flat:
    """Describe a tensor that is not cut at all.

    Raises:
        ValueError: Its elements do not lie in order (a transposed view, channels_last).
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name!r} is not contiguous (strides {tuple(tensor.stride())} for shape "
            f"{tuple(tensor.shape)}: channels_last, or a transposed view); make it so before "
            "training: model.to(memory_format=torch.contiguous_format), or .contiguous()."
        )
    shape = tuple(tensor.shape)
    segment = Segment(name, index=0, start=0, length=tensor.numel(), offset=0)
    return Flat(tensor, (name,), (shape,), (segment,))


def cut_segments(
    names: Sequence[str], shapes: Sequence[Shape], offsets: Sequence[int], low: int, high: int
) -> tuple[Segment, ...]:
    """Segments of the tensors that fall into elements `low` to `high` of their concatenation.

    Args:
        names: Tensors in the order in which they were laid out.
        shapes: Full shapes of the tensors.
        offsets: Element of the concatenation at which each tensor starts (gaps are padding).
        low: First element of this rank.
        high: Element after the last one of this rank.
    """
    segments = []
    for index, (name, shape, offset) in enumerate(zip(names, shapes, offsets, strict=True)):
        first, end = max(offset, low), min(offset + math.prod(shape), high)
        if first < end:
            segments.append(Segment(name, index, first - offset, end - first, first - low))
    return tuple(segments)


def packed_offsets(shapes: Sequence[Shape]) -> list[int]:
    """Offsets of tensors that are laid out back to back."""
    offsets, end = [], 0
    for shape in shapes:
        offsets.append(end)
        end += math.prod(shape)
    return offsets


def view_bits(x: Tensor) -> Tensor:
    """View an fp32 tensor as int32, so that a sum with zeros keeps each bit (-0.0, NaN)."""
    return x.view(torch.int32)
