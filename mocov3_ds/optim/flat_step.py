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
from mocov3_ds.optim.plain_kernels import square_sum
from mocov3_ds.optim.step_tables import Share, StepTables

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine
    from mocov3_ds.distributed.gradients import GradientWatch


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


def watch_engine(
    engine: "Engine[nn.Module] | None", names: Mapping[Tensor, str], flats: Sequence[Flat]
) -> "GradientWatch | None":
    """Note from now on which tensors have a gradient; without an engine the tensors say it."""
    if engine is None:
        return None
    from mocov3_ds.distributed import gradients

    return gradients.watch_gradients(engine, names, flats)


def start_sums(tables: StepTables, quantities: int, micro_batches: Mapping[str, int]) -> Tensor:
    """The block of a step's sums, (1 + Q, S): which tensors have a gradient here, and zeros.

    Args:
        tables: Tables of the step.
        quantities: Number Q of quantities that are measured.
        micro_batches: Bits of the micro-batches of tensors that have a gradient in some alone.
    """
    block_QS = torch.zeros(1 + quantities, len(tables.names), device=tables.device)
    if not tables.absent and not micro_batches:
        block_QS[0] = 1
    else:
        marks = [(n not in tables.absent) + micro_batches.get(n, 0) for n in tables.names]
        block_QS[0] = torch.tensor(marks, dtype=torch.float32)
    return block_QS


def measure_absent(share: Share, whole: Flat, absent: frozenset[str], sums_QS: Tensor) -> None:
    """Add the weight's square sum of the tensors that stay as they are; all else of them is 0.

    Args:
        share: The flat of a step without these tensors' segments.
        whole: The same flat with all segments.
        absent: Tensors without a gradient.
        sums_QS: Sums so far, to which the squares are added.
    """
    for segment in whole.segments:
        if segment.name in absent:
            sums_QS[Quantity.WEIGHT, share.row(segment)] += square_sum(segment.of(whole.view()))


def sum_over_ranks(
    tables: StepTables, block_QS: Tensor, exchange_device: torch.device | None
) -> Tensor:
    """Add the sums of the other ranks; all of them know alike whether the flats are sharded.

    Args:
        tables: Tables of the step; its flats are all sharded over one process group, or none is.
        block_QS: What `start_sums` gave, with the sums over this rank's elements; (1 + Q, S).
        exchange_device: Device on which the ranks exchange tensors; None for that of the block.

    Returns:
        New sums (Q, S) on the device of the block.

    Raises:
        ValueError: A tensor has a gradient on some ranks alone.
    """
    shards = [share.flat for share in tables.shares if share.flat.sharded]
    if not shards:
        return block_QS[1:].clone()
    assert all(flat.group is shards[0].group for flat in shards), "one process group a step"
    assert len(shards) == len(tables.shares), "all flats of a step are sharded, or none"
    everywhere_QS = block_QS.to(exchange_device or block_QS.device, copy=True)
    ranks.all_reduce_sum(everywhere_QS[: 1 + Quantity.PEAK], shards[0].group)
    if len(everywhere_QS) > 1 + Quantity.PEAK:
        ranks.all_reduce_max(everywhere_QS[1 + Quantity.PEAK], shards[0].group)
    if tables.absent or everywhere_QS.device.type == "cpu":  # a GPU is not waited for otherwise
        _check_agreement(tables, block_QS[0], everywhere_QS[0])
    return everywhere_QS[1:].to(block_QS.device)


def _check_agreement(tables: StepTables, here_S: Tensor, everywhere_S: Tensor) -> None:
    """Make sure that each tensor has a gradient on all ranks or on none, in equal micro-batches."""
    marks = zip(tables.names, here_S.tolist(), everywhere_S.tolist(), strict=True)
    for name, own_marks, everywhere in marks:
        if everywhere != own_marks * ranks.world_size():
            raise ValueError(
                f"{name!r} has a gradient on some of the {ranks.world_size()} ranks alone, or in "
                "other micro-batches than elsewhere. From ZeRO stage 1 on DeepSpeed adds up "
                "gradients in the order in which each rank meets them, so they are mixed up then; "
                "let all ranks use the same tensors (add 0 * tensor.sum() to the loss where one is "
                "not used), or use stage 0."
            )


def flat_gradient(flat: Flat) -> Tensor:
    """Gradient of a flat tensor in one dimension.

    Raises:
        ValueError: The gradient is sparse.
    """
    tensor = flat.tensor
    assert tensor.grad is not None, "DeepSpeed hands over a gradient of each flat"
    if tensor.grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {flat.names[0]!r} is sparse; build the layer with sparse=False and "
            "remove sparse_gradients from the DeepSpeed config."
        )
    if not tensor.grad.is_contiguous():
        tensor.grad = tensor.grad.contiguous()
    return tensor.grad.view(-1)
