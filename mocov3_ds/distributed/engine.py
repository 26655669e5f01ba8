"""The one room that knows DeepSpeed: a plain JSON in, an engine out, its tensors by name.

Facts about DeepSpeed 0.19 that this file encodes, each met in practice: `gradient_clipping` is 1.0
when it is left out; an optimizer block is ignored without a word once an optimizer object is given;
fp16 at stage 0 divides by a loss scale it never multiplied with; on CPU the first start compiles an
inference-only collective for over a minute; stage 3 with recomputation scans its trace for minutes
unless the reuse distance is 0.
"""

import difflib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

_KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "fp16",
    "bf16",
    "torch_autocast",
    "data_types",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
    "csv_monitor",
    "tensorboard",
    "wandb",
    "comet",
    "compile",
    "timers",
    "disable_allgather",
    "log_level",
    "round_robin_gradients",
}
_OBJECTS = ("zero_optimization", "fp16", "bf16", "torch_autocast", "data_types")
_HAS_NO_EFFECT = {
    "scheduler": "the schedule is ours: --warmup_epochs and --epochs",
    "activation_checkpointing": "use --chunk",
    "amp": "use bf16, fp16 or torch_autocast",
    "checkpoint": "checkpoints are ours: --save.every_steps",
    "elasticity": "the global batch is fixed by --batch on any number of ranks",
}


def engine_config(
    given: Mapping[str, Any], *, global_batch: int, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed config of a run: the user's JSON, with what follows from the batch filled in.

    Args:
        given: the user's JSON; its optimizer block must be read by the caller, it is dropped here.
        global_batch: images per optimizer step over all ranks.
        world_size: number of ranks.

    Raises:
        ValueError: unknown keys, settings without effect, batch sizes that contradict
            `global_batch`, combinations that DeepSpeed computes wrongly.
    """
    _check_keys(given)
    if global_batch % world_size:
        near = global_batch // world_size * world_size or world_size
        raise ValueError(
            f"the global batch {global_batch} does not divide over {world_size} ranks; choose "
            f"--batch {near} or {near + world_size}, or another number of ranks."
        )
    config: dict[str, Any] = json.loads(json.dumps(given))
    config.pop("optimizer", None)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    if stage == 0 and config.get("fp16", {}).get("enabled"):
        raise ValueError(
            "fp16 at ZeRO stage 0 is computed wrongly by DeepSpeed (the loss scale is divided out "
            "but never applied); use --ds zero_optimization.stage=1."
        )
    offload = zero.get("offload_optimizer") or {}
    if not isinstance(offload, Mapping):
        raise ValueError(
            f"zero_optimization.offload_optimizer is {offload!r}; it must be an object such as "
            '{"device": "cpu"}.'
        )
    ratio = offload.get("ratio", 1.0)
    if ratio != 1.0:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio is {ratio}, under which DeepSpeed updates "
            "part of the weights with an AdamW of its own; remove it."
        )
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise ValueError(
            "bf16.check_grad_overflow is false, under which DeepSpeed computes no gradient norm at "
            "ZeRO stages 1 and 2, so that no bad step could be dropped; remove it."
        )
    derived = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // world_size,
        "gradient_accumulation_steps": 1,
    }
    for key, value in derived.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed config says {key} = {config[key]}, but --batch {global_batch} on "
                f"{world_size} ranks makes it {value}; remove the key (--chunk bounds memory)."
            )
    config |= derived
    config.setdefault("gradient_clipping", 0.0)
    config.setdefault("steps_per_print", 10**9)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if stage > 0:
        zero.setdefault("reduce_bucket_size", 50_000_000)
    if stage == 3:
        zero.setdefault("stage3_max_reuse_distance", 0)
    return config


def _check_keys(given: Mapping[str, Any]) -> None:
    for key in given:
        if key in _HAS_NO_EFFECT:
            raise ValueError(
                f"the DeepSpeed config's {key!r} has no effect here; {_HAS_NO_EFFECT[key]}."
            )
        if key not in _KNOWN_KEYS:
            close = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"the DeepSpeed config has an unknown key {key!r}{hint}")
    for key in _OBJECTS:
        if not isinstance(given.get(key, {}), Mapping):
            raise ValueError(f"the DeepSpeed config's {key!r} is {given[key]!r}, not an object.")


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Dtype that the network's weights and views have under this DeepSpeed config."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def start_engine(model: nn.Module, optimizer: Any, config: Mapping[str, Any]) -> Any:
    """Hand model and optimizer to DeepSpeed; weights of rank 0 win.

    The process group must exist. `optimizer` is one of ours: it is attached to the engine's
    partitions before this returns.
    """
    speaker = logging.getLogger("DeepSpeed")
    speaker.setLevel(logging.WARNING)
    speaker.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # DeepSpeed calls torch.distributed by names that torch has renamed
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # skips a 75 s compilation of a collective that only inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    optimizer.attach(engine)
    return engine


def gradient_bytes(engine: Any) -> int:
    """Memory that backward and optimizer step allocate on a rank beside the activations.

    The whole gradient lives in the network's dtype until it is reduced (at stages 0 to 3), the part
    that the optimizer takes is fp32, and two buckets are in flight.
    """
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    numbers = sum(int(getattr(p, "ds_numel", p.numel())) for p in trained)
    size, stage = trained[0].element_size(), engine.zero_optimization_stage()
    shards = int(engine.dp_world_size) if stage else 1
    bucket = int(engine.zero_reduce_bucket_size()) if stage else 0
    total: int = numbers * size + 4 * numbers // shards + 2 * min(bucket, numbers) * size
    return total


def gathered(parameters: Iterable[nn.Parameter]) -> Any:
    """Context in which partitioned (ZeRO-3) parameters are whole; a plain one otherwise."""
    parameters = list(parameters)
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return deepspeed.zero.GatheredParameters(parameters)
    return nullcontext()


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each parameter and buffer, one at a time; all ranks must iterate."""
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            yield name, parameter.detach().clone()
    for name, buffer in module.named_buffers():
        yield name, buffer.detach().clone()


def full_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole reduced gradient, fp32, of each trained parameter; all ranks must iterate.

    Between `engine.backward` and `engine.step`. One without a gradient counts as zero.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            found = safe_get_full_grad(parameter)
            yield name, torch.zeros(shape) if found is None else found.detach().float().view(shape)
