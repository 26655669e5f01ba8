"""Whole tensors out of the flats of all ranks, and back: state that needs no layout.

Any world size and ZeRO stage can load what another one gathered.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat, Segment, Shape, view_bits


def gather_tensor(flat: Flat, index: int, values: Tensor, device: torch.device) -> Tensor:
    """Gather one whole tensor on each rank; all ranks of the flat's group must call.

    Args:
        flat: Flat tensor in which it lies.
        index: Position of the tensor among the flat's names.
        values: The flat's weights or one of its state tensors, one-dimensional.
        device: Device on which the ranks exchange tensors.

    Returns:
        An fp32 tensor of the full shape, the same bits as on the ranks that hold them.
    """
    shape = flat.shapes[index]
    full = torch.zeros(math.prod(shape), device=device)
    for segment in flat.segments:
        if segment.index == index:
            full[segment.start : segment.start + segment.length] = segment.of(values)
    if flat.sharded:
        ranks.all_reduce_sum(view_bits(full), flat.group)
    return full.view(shape)


def scatter_tensor(segment: Segment, full: Tensor, values: Tensor) -> None:
    """Copy a segment's elements of a whole tensor into the flat tensor `values`."""
    source = full.reshape(-1)[segment.start : segment.start + segment.length]
    segment.of(values).copy_(source)


def check_state(state: Mapping[str, Tensor], name: str, shape: Shape, keys: Iterable[str]) -> None:
    """Make sure that the saved state of one tensor is complete.

    Args:
        state: Key -> whole tensor, as it was saved.
        name: Name of the tensor, for the message.
        shape: Full shape of the model's tensor.
        keys: Keys that the optimizer needs.

    Raises:
        ValueError: A key is missing, or a tensor has another shape.
    """
    for key in keys:
        if key not in state:
            raise ValueError(
                f"the saved state of {name!r} has no {key!r}; it was written by another optimizer."
            )
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"the saved {key} of {name!r} has shape {tuple(state[key].shape)}, the model's "
                f"tensor {shape}."
            )
