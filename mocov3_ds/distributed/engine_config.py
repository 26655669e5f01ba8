"""The DeepSpeed config of a run: the user's JSON, checked, and what follows from batch and ranks.

Neither DeepSpeed nor torch is imported, which takes seconds: planner and launcher check configs,
too.

Facts about DeepSpeed 0.19 that this file encodes, each met in practice: `gradient_clipping` is 1.0
when it is left out; an optimizer block is ignored without a word once an optimizer object is given;
fp16 at stage 0 divides by a loss scale it never multiplied with; stage 3 with recomputation scans
its trace for minutes unless the reuse distance is 0.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mocov3_ds.distributed.engine_keys import read_settings

if TYPE_CHECKING:
    import torch

REDUCE_BUCKET = 50_000_000
"""Numbers of the gradient that are reduced at once, unless the JSON sets `reduce_bucket_size`.

DeepSpeed's own default is ten times as much (`deepspeed/runtime/zero/config.py`); two buckets in
bf16 are 200 MB here, which leaves the memory of a card to the images.
"""


def engine_config(
    settings: Mapping[str, Any], *, global_batch: int, world_size: int
) -> dict[str, Any]:
    """Complete the user's JSON with what follows from batch and number of ranks.

    Args:
        settings: The user's JSON. Its optimizer block is dropped here: the caller reads it.
        global_batch: Images per optimizer step over all ranks.
        world_size: Number of ranks that train together.

    Raises:
        ValueError: Unknown keys, values of another kind, settings without effect, batch sizes that
            contradict `global_batch`, combinations that DeepSpeed computes wrongly.
    """
    config = read_settings(settings)
    config.pop("optimizer", None)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 1)
    _check_precision(config, stage)
    _check_zero(zero, stage)
    _check_scaling(config, zero, stage)
    config |= _batch_sizes(config, global_batch, world_size)
    config.setdefault("gradient_clipping", 0.0)
    config.setdefault("steps_per_print", 10**9)
    config["timers"] = {"throughput": {"enabled": False}}  # waits for the device twice a step
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if stage > 0:
        zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
    if stage == 3:
        zero.setdefault("stage3_max_reuse_distance", 0)
    return config


def compute_dtype(config: Mapping[str, Any]) -> "torch.dtype":
    """Dtype that the network's weights and views have under this DeepSpeed config."""
    import torch  # a second, which those that check a config alone need not wait

    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def _check_precision(config: Mapping[str, Any], stage: int) -> None:
    enabled = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        raise ValueError(
            "the DeepSpeed config enables fp16 and bf16, of which a network has one; add "
            "--ds bf16.enabled=false or --ds fp16.enabled=false."
        )
    if stage == 0 and "fp16" in enabled:
        raise ValueError(
            "fp16 at ZeRO stage 0 is computed wrongly by DeepSpeed (the loss scale is divided out "
            "but never applied); use --ds zero_optimization.stage=1."
        )
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise ValueError(
            "bf16.check_grad_overflow is false, under which DeepSpeed computes no gradient norm at "
            "ZeRO stages 1 and 2, so that no bad step could be dropped; remove it."
        )
    weights = enabled[0] if enabled else "fp32"
    param_dtype = config.get("data_types", {}).get("param_dtype", weights)
    if param_dtype != weights:
        raise ValueError(
            f"data_types.param_dtype is {param_dtype}, but the weights are {weights}; remove it "
            "(bf16.enabled and fp16.enabled set the precision)."
        )


def _check_zero(zero: Mapping[str, Any], stage: int) -> None:
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            "zero_optimization.compute_grad_norm is false, without which no bad step could be "
            "dropped; remove it."
        )
    if zero.get("allgather_bucket_size", 0) % 2:
        raise ValueError(
            f"zero_optimization.allgather_bucket_size is {zero['allgather_bucket_size']}; it must "
            "be even."
        )
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(name, {}).get("device", "none")
        if device == "nvme":
            raise ValueError(
                f"zero_optimization.{name}.device is nvme, which takes weights and moments away "
                "between steps, so that per-tensor norms cannot be exact; use cpu."
            )
        if device != "none" and stage < lowest:
            raise ValueError(
                f"zero_optimization.{name}.device is {device}, which has no effect at stage "
                f"{stage}; use --ds zero_optimization.stage={lowest} or device none."
            )
    ratio = zero.get("offload_optimizer", {}).get("ratio", 1.0)
    if ratio != 1.0:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio is {ratio}, under which DeepSpeed updates "
            "part of the weights with an AdamW of its own; remove it."
        )


def _check_scaling(config: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> None:
    """Refuse what DeepSpeed itself refuses, once the run folder is there."""
    if stage < 2 or not zero.get("reduce_scatter", True):
        return
    for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if config.get(key, default) != default:
            raise ValueError(
                f"the DeepSpeed config's {key} is for ZeRO stages 0 and 1 (DeepSpeed reduces and "
                f"scatters at once at stage {stage}); remove it."
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
        if config.get(key, size) != size:
            raise ValueError(
                f"the DeepSpeed config says {key} = {config[key]}, but --batch {global_batch} on "
                f"{world_size} ranks makes it {size}; remove the key (--chunk bounds memory)."
            )
    return sizes
