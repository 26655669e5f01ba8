"""Describe DeepSpeed's partitions as segments: this file knows the attributes of its wrappers.

`engine.optimizer` is one of

    our optimizer itself                 stage 0, fp32: whole parameters
    FP16_UnfusedOptimizer                stage 0, bf16: whole fp32 clones
    DeepSpeedZeroOptimizer               stages 1 and 2: the concatenation of a group, cut evenly
    BF16_Optimizer                       stage 1, bf16 with fp32 gradient accumulation: the same
    DeepSpeedZeroOptimizer_Stage3        stage 3: each tensor cut and padded by itself

Read from DeepSpeed 0.19. Each description is compared with the model's own weights before it is
used, so another layout is an error and never a wrong trust ratio. `_hp_mapping`, DeepSpeed's own
fragment table, is not used: it is wrong with `round_robin_gradients`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine
from mocov3_ds.distributed.segments import (
    Flat,
    Segment,
    Shape,
    cut_segments,
    full_shape,
    packed_offsets,
    whole_flat,
)

Names = Mapping[Tensor, str]


def describe_flats(engine: Engine[nn.Module], names: Names) -> list[Flat]:
    """Describe every flat tensor that the engine's base optimizer is given on this rank.

    All ranks must call. Padding is made zero on the way.

    Args:
        engine: What `deepspeed.initialize` returned, before its first step.
        names: Name of each trained model parameter.

    Raises:
        ValueError: A combination under which whole-tensor norms cannot be exact, with the remedy.
        RuntimeError: This DeepSpeed lays tensors out in a way we do not know.
    """
    wrapper = engine.optimizer
    _refuse_inexact(engine, wrapper)
    kind = type(wrapper).__name__
    if isinstance(wrapper, torch.optim.Optimizer):
        drafts = _draft_stage_0_fp32(wrapper, names)
    elif kind in _DRAFTS:
        drafts = _DRAFTS[kind](wrapper, names)
    else:
        raise ValueError(
            f"DeepSpeed wraps the optimizer in {kind}, whose partitions are not known here; use "
            "ZeRO stage 0, 1, 2 or 3 without ZenFlow, SuperOffload or MiCS."
        )
    flats = [flat for flat, _ in drafts]
    for flat in flats:
        if flat.tensor.dtype != torch.float32:
            raise ValueError(
                f"the optimizer is given {flat.tensor.dtype} weights and needs fp32 masters; "
                "remove bf16_master_weights_and_grads, or convert the model to fp32 beforehand."
            )
    _compare_with_model(drafts)
    for flat in flats:
        flat.clear_gaps()
    return flats


def refresh_weights(engine: Engine[nn.Module]) -> None:
    """Make the model's weights what the fp32 masters say; all ranks must call."""
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        wrapper.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for copies, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for copy, master in zip(copies, masters, strict=True):
                copy.data.copy_(master.data)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        _refresh_stage3(wrapper)


def _refresh_stage3(wrapper: Any) -> None:
    wrapper.checkpoint_event_prologue()  # persistent parameters are partitioned, too
    if len(wrapper.persistent_parameters) > 0:
        wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
    for number, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        wrapper.fp16_partitioned_groups_flat[number].data.copy_(master.data)
        wrapper._unflatten_partitioned_parameters(number)
    wrapper.checkpoint_event_epilogue()


def whole_gradient_norm(engine: Engine[nn.Module]) -> Any:
    """Norm of the whole gradient of the step that is made, before any clipping, unscaled.

    DeepSpeed knows it before it calls the optimizer, which from stage 1 on may see parts alone.
    """
    return engine.optimizer._global_grad_norm


_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_loss_scale(engine: Engine[nn.Module]) -> dict[str, float]:
    """State of fp16 loss scaling as plain numbers; empty when nothing is scaled."""
    scaler = _dynamic_scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALE_KEYS}


def load_loss_scale(engine: Engine[nn.Module], state: Mapping[str, float]) -> None:
    """Continue loss scaling where `read_loss_scale` left it; nothing happens without scaling."""
    scaler = _dynamic_scaler(engine)
    for key in _SCALE_KEYS:
        if scaler is not None and key in state:
            setattr(scaler, key, state[key])


def _dynamic_scaler(engine: Engine[nn.Module]) -> Any:
    """DeepSpeed's loss scaler, if its scale follows overflows; else None."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def base_optimizer(engine: Engine[nn.Module]) -> Any:
    """The optimizer that the user gave to `deepspeed.initialize`."""
    wrapper = engine.optimizer
    return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer


def _refuse_inexact(engine: Engine[nn.Module], wrapper: Any) -> None:
    """Refuse combinations under which a step would be an approximation."""
    _refuse_precision(wrapper)
    if getattr(wrapper, "model_parallel_group", None) is not None or engine.mpu is not None:
        raise ValueError(
            "tensor (model) parallelism cuts a tensor once more than this optimizer sums over; "
            "use data parallelism (ZeRO) alone."
        )
    if getattr(engine, "has_moe_layers", False):
        raise ValueError(
            "mixture-of-experts layers need DeepSpeed parameter groups of their own, which this "
            "optimizer does not make; use a dense model."
        )
    if getattr(engine, "pipeline_parallelism", False):
        raise ValueError(
            "pipeline parallelism puts different tensors on different ranks, which this optimizer "
            "does not follow; use data parallelism (ZeRO) alone."
        )
    if getattr(wrapper, "swap_optimizer", False) or getattr(
        wrapper, "params_in_nvme_and_cpu", False
    ):
        raise ValueError(
            "offload to NVMe takes weights and moments away between steps; use "
            'offload_optimizer.device "cpu".'
        )


def _refuse_precision(wrapper: Any) -> None:
    unfused = type(wrapper).__name__ == "FP16_UnfusedOptimizer"
    if unfused and wrapper.low_precision_dtype == torch.float16:
        raise ValueError(
            "fp16 at ZeRO stage 0 is computed wrongly by DeepSpeed (the loss scale is divided out "
            "but never applied); use zero_optimization.stage 1."
        )
    if getattr(wrapper, "torch_autocast_gradscaler", None) is not None:
        raise ValueError(
            "torch_autocast in float16 may skip the step on one rank and not on another; use "
            "torch_autocast in bfloat16, or fp16.enabled."
        )


Draft = tuple[Flat, list[Tensor]]  # a flat and the model's parameters in the order of its names


def _draft_stage_0_fp32(wrapper: torch.optim.Optimizer, names: Names) -> list[Draft]:
    parameters = [p for group in wrapper.param_groups for p in group["params"]]
    return [(whole_flat(names[p], p), [p]) for p in parameters]


def _draft_stage_0_bf16(wrapper: Any, names: Names) -> list[Draft]:
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return [
        (whole_flat(names[copy], master), [copy])
        for copies, masters in pairs
        for copy, master in zip(copies, masters, strict=True)
    ]


def _draft_stage_1_2(wrapper: Any, names: Names) -> list[Draft]:
    groups, flats = wrapper.round_robin_bit16_groups, wrapper.single_partition_of_fp32_groups
    return _draft_even_cuts(wrapper, names, groups, flats, wrapper.round_robin_bit16_offsets)


def _draft_stage_1_bf16(wrapper: Any, names: Names) -> list[Draft]:
    groups, flats = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
    offsets = [packed_offsets([full_shape(p) for p in group]) for group in groups]
    return _draft_even_cuts(wrapper, names, groups, flats, offsets)


def _draft_even_cuts(
    wrapper: Any, names: Names, groups: Any, flats: Any, offsets: Any
) -> list[Draft]:
    """Flats that are equal parts of the concatenation of a parameter group.

    Args:
        wrapper: DeepSpeed's wrapper, which knows the process group of each parameter group.
        names: Name of each trained model parameter.
        groups: The model's parameters of each group, in the order of the concatenation.
        flats: This rank's fp32 part of each group.
        offsets: Element of the concatenation at which each parameter of each group starts.
    """
    drafts = []
    for i, flat in enumerate(flats):
        parameters, group = list(groups[i]), wrapper.real_dp_process_group[i]
        flat_names, shapes = _names_and_shapes(parameters, names)
        low = comm.get_rank(group) * flat.numel()
        segments = cut_segments(flat_names, shapes, list(offsets[i]), low, low + flat.numel())
        drafts.append((Flat(flat, flat_names, shapes, segments, True, group), parameters))
    return drafts


def _names_and_shapes(
    parameters: Sequence[Tensor], names: Names
) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
    return tuple(names[p] for p in parameters), tuple(full_shape(p) for p in parameters)


def _draft_stage_3(wrapper: Any, names: Names) -> list[Draft]:
    drafts = []
    for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        parameters = list(wrapper.fp16_groups[i])
        group = wrapper._get_sub_group_process_group(i)
        flat_names, shapes = _names_and_shapes(parameters, names)
        segments, offset = [], 0
        for index, parameter in enumerate(parameters):
            padded = parameter.ds_tensor.ds_numel
            start = comm.get_rank(group) * padded
            length = min(padded, math.prod(shapes[index]) - start)
            if length > 0:
                segments.append(Segment(flat_names[index], index, start, length, offset))
            offset += padded
        drafts.append((Flat(flat, flat_names, shapes, tuple(segments), True, group), parameters))
    return drafts


_DRAFTS = {
    "FP16_UnfusedOptimizer": _draft_stage_0_bf16,
    "DeepSpeedZeroOptimizer": _draft_stage_1_2,
    "BF16_Optimizer": _draft_stage_1_bf16,
    "DeepSpeedZeroOptimizer_Stage3": _draft_stage_3,
}


def _compare_with_model(drafts: Sequence[Draft]) -> None:
    """Check content and cover of each flat, with one verdict for all ranks."""
    wrong = 0
    for flat, parameters in drafts:
        wrong += sum(not _same(flat, segment, parameters) for segment in flat.segments)
        device = parameters[0].device
        covered = torch.tensor(flat.covered(), dtype=torch.int64, device=device)
        if flat.sharded:
            ranks.all_reduce_sum(covered, flat.group)
        wrong += sum(
            count != math.prod(shape)
            for count, shape in zip(covered.tolist(), flat.shapes, strict=True)
        )
    verdict = torch.tensor(wrong, dtype=torch.int64, device=drafts[0][1][0].device)
    if int(ranks.all_reduce_max(verdict)) > 0:
        raise RuntimeError(
            f"this DeepSpeed lays out its partitions in a way that is not known here ({wrong} "
            "tensors differ on this rank); please report the versions and the DeepSpeed config."
        )


def _same(flat: Flat, segment: Segment, parameters: Sequence[Tensor]) -> bool:
    """Whether a segment of the fp32 flat holds, rounded, what the model's parameter holds."""
    parameter = parameters[segment.index]
    if hasattr(parameter, "ds_tensor"):
        model_values = parameter.ds_tensor.detach().view(-1)[: segment.length]
    else:
        end = segment.start + segment.length
        model_values = parameter.detach().reshape(-1)[segment.start : end]
    master_values = segment.of(flat.view()).to(model_values.dtype)
    return torch.equal(master_values.to(model_values.device), model_values)
