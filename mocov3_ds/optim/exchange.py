"""The way of slices to the owners of whole matrices, and back: all ranks of a group take part.

A slice that is already where it belongs is copied and crosses no wire.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.optim.owners import Round, Transfer, list_transfers


def work_on_whole(
    rounds: Sequence[Round],
    values: Tensor,
    work: Callable[[str, Tensor], Tensor],
    *,
    group: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replace the slices of matrices on all ranks by those of what their owners make of them.

    Args:
        rounds: Matrices with their owners, round after round, the same on all ranks.
        values: Flat tensor of this rank with its slices, which are changed.
        work: Function of a name and the whole matrix, flattened, in `dtype` on `device`; it returns
            as many numbers.
        group: Process group over which the flat tensors are cut.
        device: Device on which the ranks exchange tensors, and on which the work is done.
        dtype: What travels, and what the work is given.
    """
    for matrices in rounds:
        owned = [matrix for matrix in matrices if matrix.owner == ranks.rank(group)]
        inputs = {m.name: torch.empty(m.numbers, device=device, dtype=dtype) for m in owned}
        _send(
            list_transfers(matrices, to_owners=True),
            lambda transfer: transfer.segment.of(values),
            partial(_fill_in, inputs),
            *(group, device, dtype),
        )
        results = {name: work(name, x).reshape(-1) for name, x in inputs.items()}
        _send(
            list_transfers(matrices, to_owners=False),
            partial(_read, results),
            lambda transfer, slice_: transfer.segment.of(values).copy_(slice_),
            *(group, device, dtype),
        )


def _fill_in(whole: dict[str, Tensor], transfer: Transfer, slice_: Tensor) -> None:
    _read(whole, transfer).copy_(slice_)


def _read(whole: dict[str, Tensor], transfer: Transfer) -> Tensor:
    segment = transfer.segment
    return whole[transfer.matrix.name][segment.start : segment.start + segment.length]


def _send(
    transfers: Sequence[Transfer],
    read: Callable[[Transfer], Tensor],
    write: Callable[[Transfer, Tensor], object],
    group: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make transfers, the same list on all ranks.

    Args:
        transfers: What goes from where to where.
        read: Gives the elements of a transfer on its source.
        write: Is given them, in `dtype`, on its target.
        group: Process group of the ranks.
        device: Device on which the ranks exchange tensors.
        dtype: Precision of what travels.
    """
    me, world_size = ranks.rank(group), ranks.world_size(group)
    outgoing: list[list[Tensor]] = [[] for _ in range(world_size)]
    incoming: list[list[Transfer]] = [[] for _ in range(world_size)]
    travels = False
    for transfer in transfers:
        source, target = transfer.source, transfer.target
        travels |= source != target
        if source == target == me:
            write(transfer, read(transfer).to(dtype))
        elif source == me:
            outgoing[target].append(read(transfer).to(device, dtype))
        elif target == me:
            incoming[source].append(transfer)
    if not travels:
        return
    sent = [sum(map(len, slices)) for slices in outgoing]
    received = [sum(transfer.segment.length for transfer in due) for due in incoming]
    in_order = [slice_ for slices in outgoing for slice_ in slices]
    numbers = torch.cat(in_order) if in_order else torch.empty(0, device=device, dtype=dtype)
    arrived = ranks.all_to_all(numbers, sent, received, group)
    first = 0
    for transfer in chain.from_iterable(incoming):
        end = first + transfer.segment.length
        write(transfer, arrived[first:end])
        first = end
