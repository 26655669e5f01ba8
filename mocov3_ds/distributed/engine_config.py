"""The DeepSpeed config of a run: the user's JSON, checked, and what follows from batch and ranks.

DeepSpeed itself is not imported, which takes seconds: planner and launcher check configs, too.

Facts about DeepSpeed 0.19 that this file encodes, each met in practice: `gradient_clipping` is 1.0
when it is left out; an optimizer block is ignored without a word once an optimizer object is given;
fp16 at stage 0 divides by a loss scale it never multiplied with; stage 3 with recomputation scans
its trace for minutes unless the reuse distance is 0.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from mocov3_ds.settings.spelling import did_you_mean

REDUCE_BUCKET = 50_000_000
"""Numbers of the gradient that are reduced at once, unless the JSON sets `reduce_bucket_size`.

DeepSpeed's own default is ten times as much (`deepspeed/runtime/zero/config.py`); two buckets in
bf16 are 200 MB here, which leaves the memory of a card to the images.
"""

_KNOWN_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "optimizer", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "fp16", "bf16", "torch_autocast", "data_types", "compile",
    "gradient_clipping", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather",
    "round_robin_gradients", "aio", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "comms_logger", "flops_profiler", "timers", "log_level", "csv_monitor",
    "tensorboard", "wandb", "comet",
}  # fmt: skip
_OBJECTS = ("zero_optimization", "fp16", "bf16", "torch_autocast", "data_types")
_HAS_NO_EFFECT = {
    "scheduler": "the schedule is ours: --warmup_epochs and --epochs",
    "activation_checkpointing": "use --chunk",
    "amp": "use bf16, fp16 or torch_autocast",
    "checkpoint": "checkpoints are ours: --save.every_steps",
    "elasticity": "the global batch is fixed by --batch on any number of ranks",
}


def engine_config(
    settings: Mapping[str, Any], *, global_batch: int, world_size: int
) -> dict[str, Any]:
    """Complete the user's JSON with what follows from batch and number of ranks.

    Args:
        settings: The user's JSON. Its optimizer block is dropped here: the caller reads it.
        global_batch: Images per optimizer step over all ranks.
        world_size: Number of ranks that train together.

    Raises:
        ValueError: Unknown keys, settings without effect, batch sizes that contradict
            `global_batch`, combinations that DeepSpeed computes wrongly.
    """
    _check_keys(settings)
    config: dict[str, Any] = json.loads(json.dumps(settings))
    config.pop("optimizer", None)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 1)
    _check_precision(config, stage)
    _check_offload(zero)
    config |= _batch_sizes(config, global_batch, world_size)
    config.setdefault("gradient_clipping", 0.0)
    config.setdefault("steps_per_print", 10**9)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if stage > 0:
        zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
    if stage == 3:
        zero.setdefault("stage3_max_reuse_distance", 0)
    return config


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Dtype that the network's weights and views have under this DeepSpeed config."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def _check_keys(settings: Mapping[str, Any]) -> None:
    for key in settings:
        if key in _HAS_NO_EFFECT:
            raise ValueError(
                f"the DeepSpeed config's {key!r} has no effect here; {_HAS_NO_EFFECT[key]}."
            )
        if key not in _KNOWN_KEYS:
            raise ValueError(
                f"the DeepSpeed config has an unknown key {key!r}{did_you_mean(key, _KNOWN_KEYS)}."
            )
    for key in _OBJECTS:
        if not isinstance(settings.get(key, {}), Mapping):
            raise ValueError(f"the DeepSpeed config's {key!r} is {settings[key]!r}, not an object.")


def _check_precision(config: Mapping[str, Any], stage: Any) -> None:
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    if stage == 0 and config.get("fp16", {}).get("enabled"):
        raise ValueError(
            "fp16 at ZeRO stage 0 is computed wrongly by DeepSpeed (the loss scale is divided out "
            "but never applied); use --ds zero_optimization.stage=1."
        )
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise ValueError(
            "bf16.check_grad_overflow is false, under which DeepSpeed computes no gradient norm at "
            "ZeRO stages 1 and 2, so that no bad step could be dropped; remove it."
        )


def _check_offload(zero: Mapping[str, Any]) -> None:
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


def _batch_sizes(config: Mapping[str, Any], global_batch: int, world_size: int) -> dict[str, int]:
    """DeepSpeed's three batch keys, which must be absent, "auto" or right in the user's JSON."""
    if global_batch % world_size:
        near = global_batch // world_size * world_size or world_size
        raise ValueError(
            f"the global batch {global_batch} does not divide over {world_size} ranks; choose "
            f"--batch {near} or {near + world_size}, or another number of ranks."
        )
    sizes = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // world_size,
        "gradient_accumulation_steps": 1,
    }
    for key, size in sizes.items():
        if config.get(key, "auto") not in ("auto", size):
            raise ValueError(
                f"the DeepSpeed config says {key} = {config[key]}, but --batch {global_batch} on "
                f"{world_size} ranks makes it {size}; remove the key (--chunk bounds memory)."
            )
    return sizes
