"""What `attach` is given: an engine, nothing, or something else that people have at hand."""

import functools
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.optim.gradient_clip import Clipper, refuse_two_clips

_log = logging.getLogger("mocov3_ds")

_SHARDED_BY = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP"}


def check_attachable(candidate: Any, clipper: Clipper | None = None) -> None:
    """Make sure that `attach` is given a DeepSpeed engine or nothing.

    Args:
        candidate: What it is given.
        clipper: What clips the gradients beside the engine; None = nothing.

    Raises:
        ValueError: Something else, or an engine that clips as well; the sentence says what to do.
    """
    if candidate is None:
        return
    if hasattr(candidate, "optimizer") and hasattr(candidate, "micro_steps"):
        refuse_two_clips(clipper, float(candidate.gradient_clipping()))
        return
    kind = type(candidate).__name__
    parents = {parent.__name__ for parent in type(candidate).__mro__}
    if parents & {*_SHARDED_BY}:
        raise ValueError(
            f"attach was given a {kind}: FSDP cuts the weights in a way that is not followed here; "
            "use DeepSpeed (ZeRO-3 shards as FSDP does), or DistributedDataParallel."
        )
    if isinstance(candidate, nn.Module):
        raise ValueError(
            f"attach was given a {kind}, which is no DeepSpeed engine: give what "
            "deepspeed.initialize (or accelerate's prepare, with DeepSpeed) returned; without an "
            "engine call attach() alone, which updates the model's own weights, also under "
            "DistributedDataParallel."
        )
    if hasattr(candidate, "create_optimizer") and hasattr(candidate, "args"):
        raise ValueError(
            f"attach was given a {kind}: with Transformers' Trainer make the optimizer in "
            "create_optimizer, and in a callback's on_train_begin call "
            "optimizer.attach(trainer.model_wrapped); the lines are in mocov3_ds/optim/README.md, "
            '"With Transformers\' Trainer".'
        )
    if isinstance(candidate, tuple):
        raise ValueError(
            "attach was given a tuple: deepspeed.initialize returns the engine as the first of "
            "four; engine, *_ = deepspeed.initialize(...)."
        )
    raise ValueError(
        f"attach was given a {kind}, which is no DeepSpeed engine; give what deepspeed.initialize "
        "returned first, or nothing to update the model's own weights."
    )


def check_whole(name: str, parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Make sure that a tensor is whole on this rank, as it must be without an engine.

    Args:
        name: Name of the tensor.
        parameter: The tensor as it is now.
        shape: Full shape that it had when the optimizer was made.

    Raises:
        ValueError: It is cut over the ranks, by DeepSpeed or by something else.
    """
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            f"{name!r} is cut over the ranks by ZeRO-3; call attach(engine) with what "
            "deepspeed.initialize returned."
        )
    foreign = any(hasattr(parameter, key) for key in ("placements", "_fsdp_flattened"))
    if foreign or hasattr(parameter, "_is_flat_param") or tuple(parameter.shape) != shape:
        raise ValueError(
            f"{name!r} is cut over the ranks (FSDP, tensor parallelism: {type(parameter).__name__} "
            f"of shape {tuple(parameter.shape)}), which is not followed here; use DeepSpeed "
            "(ZeRO-3 shards as FSDP does), or whole tensors."
        )


def require_attached(optimizer: Any, flats: Collection[Any]) -> None:
    """Make sure that `attach` was called.

    Args:
        optimizer: Who is to step or to give its state, for the message.
        flats: What `attach` told it of.

    Raises:
        ValueError: Nothing yet.
    """
    if not flats:
        raise ValueError(
            f"{type(optimizer).__name__} does not know its tensors' segments yet; call "
            "optimizer.attach(engine) after deepspeed.initialize, or optimizer.attach() without "
            "DeepSpeed; with Transformers' Trainer, optimizer.attach(trainer.model_wrapped) in a "
            "callback's on_train_begin (the lines are in mocov3_ds/optim/README.md)."
        )


def tell_clipping(engine: Any) -> None:
    """Say once that DeepSpeed clips gradients where its config does not mention it."""
    config = getattr(engine, "config", None)
    if not isinstance(config, Mapping):  # a file's name
        config = getattr(getattr(engine, "_config", None), "_param_dict", {})
    norm = float(engine.gradient_clipping())
    if "gradient_clipping" not in config and norm > 0 and math.isfinite(norm):
        _tell_clipping(norm)


@functools.cache
def _tell_clipping(norm: float) -> None:
    if ranks.rank() == 0:
        _log.warning(
            "the DeepSpeed config has no gradient_clipping, so DeepSpeed clips the gradient at its "
            'default, norm %s; write "gradient_clipping": %s to keep it, or 0 for no clipping.',
            norm,
            norm,
        )
