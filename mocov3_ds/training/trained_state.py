"""Which tensors of a run does a checkpoint hold, and under which names?

All of the trained module's, by its own names. The first part of a name is the group of files, the
others are the name in there:

    base.backbone.cls_token    group "base", name "backbone.cls_token"
    loss.scale                 group "loss", name "scale"; there is no such group without tensors

Parameters that are trained are saved as the optimizer's fp32 masters. Beside them stand, in groups
of their own, the optimizer's state ("optimizer", as "exp_avg/base.backbone.cls_token"), the
momentum encoder ("momentum") and the k-NN queues ("extra").
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.distributed.buffers import persistent_buffers
from mocov3_ds.distributed.engine import full_tensors
from mocov3_ds.model.loss import ContrastiveLoss, PairLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.tensor_differences import differing_tensors
from mocov3_ds.optim.gradient_clip import CLIP_KEY
from mocov3_ds.optim.sharded import ShardedOptimizer

NamedTensors = Iterator[tuple[str, Tensor]]

GROUPS = ("base", "loss")
"""children of `step.QueriesToLoss` in their order, each with a group of files"""


def split_name(name: str) -> tuple[str, str]:
    """Group of files and name in there of a tensor of the trained module.

    Args:
        name: name in the module's state dict.

    Raises:
        ValueError: the tensor belongs to none of the module's children in `GROUPS`.
    """
    group, _, name_in_group = name.partition(".")
    if group not in GROUPS or not name_in_group:
        raise ValueError(
            f"the tensor {name!r} of the trained module belongs to none of its parts "
            f"{', '.join(GROUPS)}, so no checkpoint could hold it; make it part of one of them."
        )
    return group, name_in_group


def check_restorable(model: nn.Module) -> None:
    """Refuse a module that could be trained and saved, but not brought back.

    Args:
        model: the trained module, before the engine takes it over.

    Raises:
        ValueError: it has a tensor that a checkpoint would not hold or DeepSpeed cannot train.
    """
    saved_names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    # a backbone may have tables beside its state; whatever a loss has must come back
    kept_names = {name for name, _ in persistent_buffers(model)}
    tables = {name for name, _ in model.named_buffers()} - kept_names
    saved_names -= {name for name in tables if name.startswith("base.backbone.")}
    for name in sorted(saved_names):
        split_name(name)
    different = sorted(saved_names ^ {*model.state_dict()})
    if different:
        raise ValueError(
            f"{len(different)} tensors of the trained module, e.g. {different[0]!r}, differ "
            "between its parameters and buffers and its state dict, so no checkpoint could bring "
            "them back; share no parameter under two names, and register buffers as persistent."
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.dim():
            raise ValueError(
                f"the trained tensor {name!r} has no dimension, and DeepSpeed cannot take it; give "
                "it the shape (1,)."
            )


# ----------------------------------------------------------------------------------------- writing


def weight_streams(
    model: nn.Module, optimizer: ShardedOptimizer, momentum_encoder: MomentumEncoder
) -> dict[str, NamedTensors]:
    """Whole tensors of the trained module by group; all ranks iterate them in this order.

    Frozen parameters and buffers are taken as they are. The engine keeps frozen weights in low
    precision alone: where the momentum encoder's fp32 copy rounds to the same numbers, that is
    taken, so that an attempt in bf16 costs them nothing.

    Args:
        model: the trained module, in the engine's hands.
        optimizer: optimizer of its trained parameters, whose fp32 masters are saved.
        momentum_encoder: momentum encoder of the run.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    masters = {f"base.{name}": tensor for name, tensor in momentum_encoder.full_state()}
    # in the module's order, so one child after the other
    weights = groupby(optimizer.full_state("weight"), key=lambda item: split_name(item[0])[0])

    def stream_group(group: str, child: nn.Module) -> NamedTensors:
        if any(name.startswith(f"{group}.") for name in trained):
            _, members = next(weights)
            for name, state in members:
                yield split_name(name)[1], state["weight"]
        for name_in_group, tensor in full_tensors(child):
            name = f"{group}.{name_in_group}"
            if name not in trained:
                master = masters.get(name, tensor)
                rounds_to_it = torch.equal(master.to(tensor.dtype), tensor)
                yield name_in_group, master if rounds_to_it else tensor

    children = dict(model.named_children())
    return {group: stream_group(group, children[group]) for group in GROUPS}


def optimizer_stream(optimizer: ShardedOptimizer) -> NamedTensors:
    """The optimizer's state tensors as "exp_avg/NAME"; all ranks iterate together."""
    keys = (*optimizer.moments, *[CLIP_KEY] * (optimizer.clipper is not None))
    if not keys:  # `full_state` without keys would give the weights
        return
    for name, state in optimizer.full_state(*keys):
        for key, tensor in state.items():
            yield f"{key}/{name}", tensor


# ----------------------------------------------------------------------------------------- reading


def load_weights(model: nn.Module, saved: Checkpoint) -> None:
    """Fill the trained module from a checkpoint, before the engine takes it over.

    Args:
        model: the trained module with the run's architecture and loss.
        saved: checkpoint that the run goes on from.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tensors = {
        f"{group}.{name}": saved.read_tensor(group, name)
        for group in GROUPS
        for name in saved.tensor_names(group)
    }
    if names := differing_tensors(model.state_dict(), tensors):
        raise ValueError(
            f"checkpoint {saved.folder} is of another model: {len(names)} tensors differ, "
            f"e.g. {', '.join(names[:3])}."
        )
    model.load_state_dict(tensors)


def loss_name(loss: PairLoss) -> str:
    """Name of a loss as checkpoints tell it: a run goes on with the loss that it began with."""
    return type(loss).__qualname__


def check_loss(loss: PairLoss, saved: Checkpoint) -> None:
    """Refuse to go on with another loss, which a loss without tensors would not show.

    Args:
        loss: loss that the run is built with.
        saved: checkpoint that the run goes on from; one without a name had the paper's loss.

    Raises:
        ValueError: the checkpoint was trained with another loss.
    """
    earlier, present = saved.state.get("loss", ContrastiveLoss.__qualname__), loss_name(loss)
    if earlier != present:
        raise ValueError(
            f"checkpoint {saved.folder} was trained with the loss {earlier}, and the run is "
            f"started with {present}; start it with the same loss, or give it another --name."
        )


def load_buffers(model: nn.Module, saved: Checkpoint) -> None:
    """Set the buffers of the trained module back to a checkpoint of the same run."""
    for name, buffer in persistent_buffers(model):
        buffer.copy_(saved.read_tensor(*split_name(name)))


def load_optimizer(optimizer: ShardedOptimizer, saved: Checkpoint) -> None:
    """Set fp32 masters and optimizer state back to a checkpoint; all ranks must call.

    Args:
        optimizer: optimizer of the run, attached to its engine.
        saved: checkpoint of the run.

    Raises:
        ValueError: the checkpoint is of another model or another optimizer.
    """
    names = saved.tensor_names("optimizer") if optimizer.clipper is not None else ()
    clips = {name for name in names if name.startswith(f"{CLIP_KEY}/")}

    def read_state(name: str) -> dict[str, Tensor]:
        moments = {
            key: saved.read_tensor("optimizer", f"{key}/{name}")
            for key in optimizer.moments_of(name)
        }
        if (clip := f"{CLIP_KEY}/{name}") in clips:
            moments[CLIP_KEY] = saved.read_tensor("optimizer", clip)
        return {"weight": saved.read_tensor(*split_name(name)), **moments}

    optimizer.load_full_state(read_state, saved.state_value("optimizer_steps"))
