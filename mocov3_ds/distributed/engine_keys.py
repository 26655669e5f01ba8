"""Every key of a DeepSpeed JSON: what value it takes, or why it would have no effect here.

`read_settings` returns a typed copy of a user's JSON, before anything is built or written. A key
with a reader is honoured. A key of `_REFUSED` would change nothing here (or something that it must
not); it passes where it is switched off, so that one file serves this program and others.
`ds_configs/README.md` shows the table to users. Read from DeepSpeed 0.19: `runtime/config.py`,
`runtime/zero/config.py`, `runtime/precision_config.py` and the configs that these name.
"""

import json
from collections.abc import Mapping
from typing import Any

from mocov3_ds.distributed.engine_values import (
    Reader,
    check_depth,
    is_off,
    number,
    read_class_paths,
    read_names,
    read_parameter,
    read_switch,
    read_text,
    refuse_value,
    whole,
    word,
)
from mocov3_ds.settings.spelling import did_you_mean

_DTYPES = word("fp32", "fp16", "bf16")

READERS: Mapping[str, Reader] = {
    "train_batch_size": whole(1),
    "train_micro_batch_size_per_gpu": whole(1),
    "gradient_accumulation_steps": whole(1),
    "gradient_clipping": number(),
    "communication_data_type": _DTYPES,
    "prescale_gradients": read_switch,
    "gradient_predivide_factor": number(1e-6),
    "wall_clock_breakdown": read_switch,
    "memory_breakdown": read_switch,
    "log_level": word("debug", "info", "warning", "error", "critical"),
    "zero_optimization.stage": whole(0, 3),
    "zero_optimization.contiguous_gradients": read_switch,
    "zero_optimization.reduce_scatter": read_switch,
    "zero_optimization.reduce_bucket_size": whole(1),
    "zero_optimization.use_multi_rank_bucket_allreduce": read_switch,
    "zero_optimization.allgather_partitions": read_switch,
    "zero_optimization.allgather_bucket_size": whole(),
    "zero_optimization.overlap_comm": read_switch,
    "zero_optimization.compute_grad_norm": read_switch,
    "zero_optimization.sub_group_size": whole(),
    "zero_optimization.stage3_prefetch_bucket_size": whole(),
    "zero_optimization.stage3_param_persistence_threshold": whole(),
    "zero_optimization.stage3_model_persistence_threshold": whole(high=2.0**63),
    "zero_optimization.stage3_max_live_parameters": whole(),
    "zero_optimization.stage3_max_reuse_distance": whole(),
    "zero_optimization.stage3_module_granularity_threshold": whole(),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": read_switch,
    "zero_optimization.stage3_allgather_sequential": read_switch,
    "zero_optimization.ignore_unused_parameters": read_switch,
    "zero_optimization.round_robin_gradients": read_switch,
    "zero_optimization.parameter_alignment": read_switch,
    "zero_optimization.zero_hpz_partition_size": whole(1),
    "zero_optimization.zero_quantized_weights": read_switch,
    "zero_optimization.zero_quantized_nontrainable_weights": read_switch,
    "zero_optimization.zero_quantized_gradients": read_switch,
    "zero_optimization.memory_efficient_linear": read_switch,
    "zero_optimization.override_module_apply": read_switch,
    "zero_optimization.log_trace_cache_warnings": read_switch,
    "zero_optimization.enable_sanity_checks": read_switch,
    "zero_optimization.offload_optimizer.device": word("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.nvme_path": read_text,
    "zero_optimization.offload_optimizer.buffer_count": whole(),
    "zero_optimization.offload_optimizer.pin_memory": read_switch,
    "zero_optimization.offload_optimizer.pipeline_read": read_switch,
    "zero_optimization.offload_optimizer.pipeline_write": read_switch,
    "zero_optimization.offload_optimizer.fast_init": read_switch,
    "zero_optimization.offload_optimizer.ratio": number(0, 1),
    "zero_optimization.offload_param.device": word("none", "cpu", "nvme"),
    "zero_optimization.offload_param.nvme_path": read_text,
    "zero_optimization.offload_param.buffer_count": whole(),
    "zero_optimization.offload_param.buffer_size": whole(),
    "zero_optimization.offload_param.max_in_cpu": whole(),
    "zero_optimization.offload_param.pin_memory": read_switch,
    "fp16.enabled": read_switch,
    "fp16.auto_cast": read_switch,
    "fp16.loss_scale": number(),
    "fp16.initial_scale_power": whole(0, 127),
    "fp16.loss_scale_window": whole(1),
    "fp16.hysteresis": whole(1),
    "fp16.consecutive_hysteresis": read_switch,
    "fp16.min_loss_scale": whole(1),
    "bf16.enabled": read_switch,
    "bf16.immediate_grad_update": read_switch,
    "bf16.check_grad_overflow": read_switch,
    "torch_autocast.enabled": read_switch,
    "torch_autocast.dtype": word(
        *("fp16", "bf16", "float16", "bfloat16", "torch.float16", "torch.bfloat16")
    ),
    "torch_autocast.lower_precision_safe_modules": read_class_paths,
    "data_types.grad_accum_dtype": _DTYPES,
    "data_types.param_dtype": _DTYPES,
    "data_types.buffer_dtype": _DTYPES,
    "data_types.keep_in_fp32_modules": read_names,
    "flops_profiler.enabled": read_switch,
    "flops_profiler.recompute_fwd_factor": number(),
    "flops_profiler.profile_step": whole(1),
    "flops_profiler.module_depth": whole(-1),
    "flops_profiler.top_modules": whole(1),
    "flops_profiler.detailed": read_switch,
    "flops_profiler.output_file": read_text,
}  # fmt: skip
"""Dotted name of each key that is honoured -> what reads its value."""

_ALIASES = {
    f"zero_optimization.{name}": f"zero_optimization.stage3_{name}"
    for name in (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
        *("max_live_parameters", "max_reuse_distance", "module_granularity_threshold"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    )
}
"""Second names that DeepSpeed takes for a key."""

_OPTIONAL = {
    *("communication_data_type", "log_level", "zero_optimization.overlap_comm", "torch_autocast"),
    *("zero_optimization.offload_optimizer", "zero_optimization.offload_param"),
    *(f"zero_optimization.{kind}.nvme_path" for kind in ("offload_optimizer", "offload_param")),
    *("data_types.grad_accum_dtype", "data_types.param_dtype", "data_types.buffer_dtype"),
    *("torch_autocast.lower_precision_safe_modules", "flops_profiler.output_file"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
}
"""Keys whose null is DeepSpeed's own default: they count as left out."""

_DERIVED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *(name for name in READERS if name.endswith(("bucket_size", "_threshold", "sub_group_size"))),
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.overlap_comm",
    "data_types.keep_in_fp32_modules",
}
"""Keys that decide no number of a run, or that --batch decides: "auto" counts as left out."""

_ALONE = "this block would get the learning rate alone"
_CHECKPOINTS = "checkpoints are ours: --save.every_steps"
_PROFILE = "use --profile STEPS"
_REMOVED = "DeepSpeed has removed it"
_MASTERS = "the optimizer needs fp32 masters"
_OTHER_OPTIMIZER = "it brings an optimizer of its own, beside the one that is trained with here"

_REFUSED: Mapping[str, str] = {
    "scheduler": "the schedule is ours: --warmup_epochs and --epochs",
    "activation_checkpointing": "use --chunk or --recompute_blocks",
    "amp": "use bf16, fp16 or torch_autocast",
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates": _CHECKPOINTS,
    "elasticity": "the global batch is fixed by --batch on any number of ranks",
    "tensorboard": f"use --log tensorboard, which is the default; {_ALONE}",
    "csv_monitor": f"use --log csv; {_ALONE}",
    "wandb": f"use --log wandb; {_ALONE}",
    "comet": f"use --log comet_ml; {_ALONE}",
    "comms_logger": f"nothing asks DeepSpeed for its summary; {_PROFILE}",
    "timers": f"they time what is not printed; {_PROFILE}",
    "compile": "use --compile_blocks",
    "aio": "there is no offload to NVMe; remove it",
    "disable_allgather": "DeepSpeed itself no longer reads it; remove it",
    "disable_python_gc": "DeepSpeed itself no longer reads it; remove it",
    "gradient_allreduce_op": "the loss is the mean over the global batch; remove it",
    "sparse_gradients": _REMOVED,
    "dataloader_drop_last": "batches are ours: --data.shards and --batch",
    "data_efficiency": "batches are ours: --data.shards and --batch",
    "curriculum_learning": "batches are ours: --data.shards and --batch",
    "vocabulary_size": "there are no words; remove it",
    "autotuning": "use mocov3 plan, and --chunk 0 measures what fits",
    "hybrid_engine": "nothing is generated; remove it",
    "pipeline": "the network is not cut into stages; use ZeRO",
    "tensor_parallel": "tensors are not cut; use ZeRO stage 3",
    "sequence_parallel_size": "images are not cut; use --chunk",
    "seq_parallel_communication_data_type": "images are not cut; use --chunk",
    "expert_parallel": "there are no experts; remove it",
    "use_data_before_expert_parallelism": "there are no experts; remove it",
    "weight_quantization": "it is for inference; remove it",
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "progressive_layer_drop": "use --model.drop_path",
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer.device=cpu",
    "zero_optimization.cpu_offload_param": "use zero_optimization.offload_param.device=cpu",
    "zero_optimization.cpu_offload_use_pin_memory": "use offload_optimizer.pin_memory",
    "zero_optimization.elastic_checkpoint": f"{_CHECKPOINTS}, and open on any number of ranks",
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "use mocov3 export",
    "zero_optimization.gather_16bit_weights_on_model_save": "use mocov3 export",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "use mocov3 export",
    "zero_optimization.legacy_stage1": "DeepSpeed itself no longer reads it; remove it",
    "zero_optimization.leaf_module": "chunks that run again gather layer by layer; remove it",
    "zero_optimization.zenflow": _OTHER_OPTIMIZER,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no offload to NVMe",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.offload_optimizer.super_offload": _OTHER_OPTIMIZER,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OTHER_OPTIMIZER,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
}  # fmt: skip
"""Dotted name of each key that is refused where it is on -> what to use, or why."""

_HARMLESS: Mapping[str, Any] = {
    "managed_gradient_accumulation": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_allreduce_op": "mean",
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.8,
    "sequence_parallel_size": 1,
}
"""Keys without effect that pass at the value which holds anyway: DeepSpeed's default."""

_SILENT = (
    'it prints where log_level is "info" alone; add that, or remove the key and read '
    "RUN/metrics.jsonl, which has a row of each step"
)
_NEED_INFO = ("steps_per_print", "dump_state")
"""Keys that print through DeepSpeed's log, which is silent below warnings unless log_level is."""


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A user's DeepSpeed JSON with each value typed, and without what is switched off anyway.

    Args:
        settings: the JSON object, which stays as it is; its optimizer block is only read as far as
            its params are text.

    Raises:
        ValueError: an unknown key, a value that is not of its key's kind, or a key that would have
            no effect; one sentence with the key, the value and the remedy.
    """
    check_depth(settings)
    typed = _read_object("", settings)
    speaks = typed.get("log_level") in ("info", "debug")
    for name in _NEED_INFO:
        if name in typed and not speaks:
            if not is_off(settings[name]):
                raise _refuse_effect(name, _SILENT)
            del typed[name]
    return typed


def drop_idle_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a run that an earlier version started, without keys that had no effect in it.

    Args:
        settings: the JSON object, as the run's config.json holds it.
    """
    idle = {*_REFUSED, *_HARMLESS, *_NEED_INFO} - {"gradient_allreduce_op"}

    def drop_inside(prefix: str, node: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: drop_inside(f"{prefix}{key}.", value) if isinstance(value, Mapping) else value
            for key, value in node.items()
            if f"{prefix}{key}" not in idle
        }

    return drop_inside("", settings)


def _read_object(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for key, value in settings.items():
        spelling = f"{prefix}{key}"
        name = _ALIASES.get(spelling, spelling)
        leaf = name.rpartition(".")[2]
        if leaf in typed:
            raise ValueError(
                f"the DeepSpeed config has {name} twice, with and without stage3_; keep one."
            )
        if "." in key:  # a path of --ds, which means nothing as one key of a file
            raise _unknown_key(prefix, key)
        if name == "optimizer":
            typed[leaf] = _read_optimizer(value)
        elif name in _HARMLESS and value in (_HARMLESS[name], None):
            continue
        elif name in _HARMLESS or (name in _REFUSED and not is_off(value)):
            raise _refuse_effect(name, _REFUSED.get(name, "remove it"))
        elif name in _REFUSED:
            continue
        elif name in _NEED_INFO:
            read = read_switch if name == "dump_state" else number(1)
            typed[leaf] = value if is_off(value) else read(name, value)
        elif (value is None and name in _OPTIONAL) or (value == "auto" and name in _DERIVED):
            continue
        elif name in READERS:
            typed[leaf] = READERS[name](name, value)
        elif name and _inner_keys(name):
            if not isinstance(value, Mapping):
                raise refuse_value(name, value, f"an object such as {_example_object(name)}")
            typed[leaf] = _read_object(f"{name}.", value)
        else:
            raise _unknown_key(prefix, key)
    return typed


def _read_optimizer(block: Any) -> Any:
    """The optimizer block, with numbers in its params that were text."""
    if not isinstance(block, Mapping) or not isinstance(block.get("params"), Mapping):
        return block  # `optim.build` says what is wrong with it
    params = {
        key: read_parameter(f"optimizer.params.{key}", value)
        for key, value in block["params"].items()
    }
    return {**block, "params": params}


def _inner_keys(name: str) -> list[str]:
    """Names of the keys directly inside an object; for an empty name those of the whole JSON."""
    prefix = f"{name}." if name else ""
    all_keys = (*READERS, *_REFUSED, *_HARMLESS, *_NEED_INFO, *_ALIASES, "optimizer")
    tails = (key.removeprefix(prefix) for key in all_keys if key.startswith(prefix))
    return list(dict.fromkeys(key.partition(".")[0] for key in tails))


def _example_object(name: str) -> str:
    """An object with the first key that is honoured in it."""
    key = next(key for key in READERS if key.startswith(f"{name}."))
    value = {"stage": 1, "device": "cpu", "enabled": True}.get(key.removeprefix(f"{name}."), "...")
    return json.dumps({key.removeprefix(f"{name}."): value})


def _unknown_key(prefix: str, key: str) -> ValueError:
    where = f" in {prefix[:-1]}" if prefix else ""
    hint = did_you_mean(key, _inner_keys(prefix[:-1]))
    if not hint:
        elsewhere = [name for name in READERS if name.rpartition(".")[2] == key]
        hint = f" (did you mean {elsewhere[0]}?)" if elsewhere else ""
    return ValueError(f"the DeepSpeed config has an unknown key {key!r}{where}{hint}.")


def _refuse_effect(name: str, instead: str) -> ValueError:
    return ValueError(f"the DeepSpeed config's {name!r} has no effect here; {instead}.")
