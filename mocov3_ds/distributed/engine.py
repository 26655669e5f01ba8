"""Start a DeepSpeed engine on one of our optimizers, and read its tensors by name.

Facts about DeepSpeed 0.19 that this file encodes, each met in practice: on CPU the first start
compiles an inference-only collective for over a minute; it calls torch.distributed by names that
torch has renamed; parameters of ZeRO-3 have no elements until they are gathered.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from mocov3_ds.distributed import devices
from mocov3_ds.distributed.buffers import persistent_buffers
from mocov3_ds.distributed.engine_config import compute_dtype
from mocov3_ds.distributed.gradient_norm import speed_up_norm
from mocov3_ds.distributed.stage3_waits import order_on_device

Model = TypeVar("Model", bound=nn.Module)
Model_co = TypeVar("Model_co", bound=nn.Module, covariant=True)


class Engine(Protocol[Model_co]):
    """What this project uses of a DeepSpeed engine; `Engine[M]` trains a module of class `M`."""

    config: dict[str, Any]
    """the DeepSpeed JSON that the engine was built from"""
    optimizer: Any
    """DeepSpeed's wrapper around our optimizer, or our optimizer itself (see `zero`)"""
    device: torch.device
    mpu: Any
    """the model-parallel unit, None without one"""
    dp_world_size: int
    global_steps: int
    """steps made, dropped ones included; it goes up at the end of `step`"""
    micro_steps: int
    """micro-batches gone through; it goes up at the end of `step`"""

    @property
    def module(self) -> Model_co:
        """The trained module."""

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass of the module."""

    def backward(self, loss: Tensor) -> Any:
        """Gradients of `loss`, reduced over the ranks as the ZeRO stage asks for."""

    def step(self) -> None:
        """Let the optimizer move the weights, unless the gradient is not finite."""

    def was_step_applied(self) -> bool:
        """Whether the last `step` moved the weights."""

    def fp16_enabled(self) -> bool:
        """Whether the weights are fp16, under a loss scale."""

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""

    def gradient_clipping(self) -> float:
        """Largest norm of the whole gradient; longer ones are shortened, 0 for never."""

    def zero_optimization_stage(self) -> int:
        """ZeRO stage, 0 to 3."""

    def zero_reduce_bucket_size(self) -> int:
        """Numbers of the gradient that are reduced at once."""

    def destroy(self) -> None:
        """Give back what the engine holds."""


class AttachableOptimizer(Protocol):
    """What this file uses of our optimizers."""

    def attach(self, engine: Engine[Any] | None = None) -> None:
        """Learn which segments of the engine's partitions are on this rank."""


def start_engine(
    model: Model, optimizer: AttachableOptimizer, config: Mapping[str, Any]
) -> Engine[Model]:
    """Hand model and optimizer to DeepSpeed; weights of rank 0 win.

    The process group must exist.

    Args:
        model: Module to train; the engine calls it and reduces its gradients.
        optimizer: One of ours, which is attached to the engine's partitions before this returns.
        config: DeepSpeed config, as `engine_config` gave it.

    Raises:
        ValueError: DeepSpeed refuses the config.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # DeepSpeed calls torch.distributed by names that torch has renamed
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # skips a 75 s compilation of a collective that only inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine: Engine[Model]
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"DeepSpeed refuses its config: {reason}.") from error
    speed_up_norm(engine.optimizer)
    order_on_device(engine.optimizer)
    optimizer.attach(engine)
    return engine


def release_engine(engine: Engine[nn.Module]) -> None:
    """End an engine, so that its memory is freed in a process that goes on.

    Its hooks on gradients keep it alive where Python's collector does not see it, and DeepSpeed
    puts the module of each engine of ZeRO-3 on a list that lives as long as the process.

    Args:
        engine: What `start_engine` returned; at ZeRO-3 its module cannot compute any more.
    """
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]


def check_precision(config: Mapping[str, Any]) -> None:
    """Refuse a precision that this rank's device does not have, before anything is built on it.

    Args:
        config: DeepSpeed config, as `engine_config` gave it.

    Raises:
        ValueError: The device has no fp16, or no bf16 of its own.
    """
    accelerator, precision = get_accelerator(), compute_dtype(config)
    if precision == torch.bfloat16:
        devices.check_bf16(torch.device(accelerator.current_device_name()))
    missing = {
        torch.float16: not accelerator.is_fp16_supported(),
        torch.bfloat16: not accelerator.is_bf16_supported(),
    }
    if missing.get(precision):
        kind = "fp16" if precision == torch.float16 else "bf16"
        raise ValueError(
            f"{kind}.enabled is true, but {kind} is not for this device "
            f"({accelerator.device_name()}); use --ds {kind}.enabled=false for fp32, or the other "
            "of fp16 and bf16."
        )


def gradient_bytes(engine: Engine[nn.Module]) -> int:
    """Bytes that backward and optimizer step allocate on a rank beside the activations.

    The whole gradient lives in the network's dtype until it is reduced (at stages 0 to 3), the part
    that the optimizer takes is fp32, and two buckets are in flight.
    """
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    numbers = sum(int(getattr(p, "ds_numel", p.numel())) for p in trained)
    size, stage = trained[0].element_size(), engine.zero_optimization_stage()
    shards = engine.dp_world_size if stage else 1
    bucket = engine.zero_reduce_bucket_size() if stage else 0
    return numbers * size + 4 * numbers // shards + 2 * min(bucket, numbers) * size


def gather_parameters(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which partitioned (ZeRO-3) parameters can be read whole; a plain one otherwise.

    Those that are whole already stay so: DeepSpeed's context would cut them at its end, and a
    backward that counts on them, as on small weights that stage 3 leaves whole, would find nothing.
    """
    absent = [
        parameter
        for parameter in parameters
        if getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) != ZeroParamStatus.AVAILABLE
    ]
    return deepspeed.zero.GatheredParameters(absent) if absent else nullcontext()


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each parameter and saved buffer, one by one; all ranks iterate."""
    for name, parameter in module.named_parameters():
        with gather_parameters([parameter]):
            yield name, parameter.detach().clone()
    for name, buffer in persistent_buffers(module):
        yield name, buffer.detach().clone()
