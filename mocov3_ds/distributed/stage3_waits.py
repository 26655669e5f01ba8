"""What DeepSpeed's ZeRO-3 lets the host wait for, ordered on the device instead.

After each backward DeepSpeed 0.19 lets the host wait until the gradients are reduced (`stage3.py`,
`independent_gradient_partition_epilogue`), so that nothing is launched meanwhile. The kernels that
follow need them, the host does not: they wait on the device, on their stream. Where the optimizer
is offloaded, the host computes with them, and its wait stays.

On one rank weights are not gathered, and taking them up launches nothing where they are on the
device; DeepSpeed lets the host wait for the stream each time even so (`partition_parameters.py`,
`NoGatherHandle` and `NoGatherCoalescedHandle`), and orders the streams itself after it.

DeepSpeed's other wait of a step, for the small weights that stay whole (`partition_parameters.py`,
end of `_allgather_params_coalesced`), stays as well: it comes at the end of the step, where the
host waits for the step's signals next.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters


class OrderingStream(torch.cuda.Stream):
    """A stream for which not the host waits, but the current stream, on the device."""

    def synchronize(self) -> None:
        """Let what is launched next begin when all that is on this stream is done."""
        torch.cuda.current_stream(self.device).wait_stream(self)


def order_on_device(wrapper: Any) -> None:
    """Let one of DeepSpeed's wrappers order on the device what the host need not wait for.

    Args:
        wrapper: DeepSpeed's wrapper around the optimizer, `engine.optimizer`; nothing is done for
            other ones than that of stage 3, on a CPU, and where the optimizer is offloaded.
    """
    stream = getattr(wrapper, "reduce_and_partition_stream", None)
    is_stage_3 = type(wrapper).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    if not is_stage_3 or wrapper.offload_optimizer or not isinstance(stream, torch.cuda.Stream):
        return
    wrapper.reduce_and_partition_stream = OrderingStream(  # type: ignore[no-untyped-call]
        stream_id=stream.stream_id,
        device_index=stream.device_index,
        device_type=stream.device_type,
    )
    _order_weights()


@functools.cache
def _order_weights() -> None:
    """Let the handles of weights on one rank order on the device, once in a process."""
    for handle in (
        partition_parameters.NoGatherHandle,
        partition_parameters.NoGatherCoalescedHandle,
    ):
        handle.wait = _without_host(handle.wait)


def _without_host(wait: Callable[..., None]) -> Callable[..., None]:
    """A handle's `wait` that takes the device's order of launches for enough."""

    @functools.wraps(wait)
    def ordered_wait(handle: Any, **kwargs: Any) -> None:
        accelerator: Any = get_accelerator()
        accelerator.resolves_data_dependency = lambda: True
        try:
            wait(handle, **kwargs)
        finally:
            del accelerator.resolves_data_dependency

    return ordered_wait
