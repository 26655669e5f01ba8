"""The flat tensors of a step: which there are, their gradients, and sums over all ranks.

Legend: S = tensors that one call of `step` updates; Q = quantities measured, see `kernel_types`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat, whole_flat
from mocov3_ds.optim.kernel_types import Quantity
from mocov3_ds.optim.step_tables import Share

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine


def describe_flats(
    optimizer: torch.optim.Optimizer,
    engine: "Engine[nn.Module] | None",
    names: Mapping[Tensor, str],
) -> list[Flat]:
    """Describe the flat tensors that an optimizer is given on this rank.

    Args:
        optimizer: The optimizer that the engine must have been built with.
        engine: What `deepspeed.initialize` returned; without one the tensors are whole.
        names: Name of each tensor that the optimizer trains.

    Raises:
        ValueError: An engine of another optimizer, or one under which the step cannot be exact, or
            tensors that are not fp32 without an engine that keeps fp32 masters.
    """
    if engine is None:
        return [_describe_plain(name, parameter) for parameter, name in names.items()]

    from mocov3_ds.distributed import zero  # DeepSpeed takes seconds, and not all need it

    if zero.base_optimizer(engine) is not optimizer:
        raise ValueError(
            "the engine was built with another optimizer; call "
            "deepspeed.initialize(model=model, optimizer=optimizer, config=config) without an "
            "optimizer block in the config, then optimizer.attach(engine)."
        )
    return zero.describe_flats(engine, names)


def _describe_plain(name: str, parameter: Tensor) -> Flat:
    if parameter.dtype != torch.float32:
        raise ValueError(
            f"{name!r} is {parameter.dtype}; without an engine that keeps fp32 masters the weights "
            "themselves must be fp32."
        )
    return whole_flat(name, parameter)


def sum_over_ranks(
    shares: Sequence[Share], local_QS: Tensor, exchange_device: torch.device | None
) -> Tensor:
    """Add the sums of the other ranks; all of them know alike whether the flats are sharded.

    Args:
        shares: Flats of the step, all sharded over one process group or none.
        local_QS: Sums over the elements of this rank.
        exchange_device: Device on which the ranks exchange tensors; None for that of `local_QS`.

    Returns:
        New sums on the device of `local_QS`.
    """
    shards = [share.flat for share in shares if share.flat.sharded]
    if not shards:
        return local_QS.clone()
    assert all(flat.group is shards[0].group for flat in shards) and len(shards) == len(shares), (
        "one call of step updates tensors of one process group"
    )
    sums_QS = local_QS.to(exchange_device or local_QS.device, copy=True)
    ranks.all_reduce_sum(sums_QS[: Quantity.PEAK], shards[0].group)
    if len(sums_QS) > Quantity.PEAK:
        ranks.all_reduce_max(sums_QS[Quantity.PEAK], shards[0].group)
    return sums_QS.to(local_QS.device)


def flat_gradient(flat: Flat) -> Tensor:
    """Gradient of a flat tensor in one dimension; zeros where a tensor took no part in the loss.

    Raises:
        ValueError: The gradient is sparse.
    """
    tensor = flat.tensor
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    elif tensor.grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {flat.names[0]!r} is sparse; build the layer with sparse=False and "
            "remove sparse_gradients from the DeepSpeed config."
        )
    elif not tensor.grad.is_contiguous():
        tensor.grad = tensor.grad.contiguous()
    return tensor.grad.view(-1)
