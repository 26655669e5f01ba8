"""What the host waited for at ZeRO-3 is ordered on the card; on the fake GPU, and by refusal."""

from types import SimpleNamespace
from typing import Any

import pytest

from mocov3_ds.distributed.stage3_waits import order_on_device
from tests.fake_gpu.process import run_on_fake_gpu


def test_other_wrappers_and_those_without_a_stream_stay_as_they_are() -> None:
    stream = object()
    for name, offloads in (("DeepSpeedZeroOptimizer", False), ("DeepSpeedZeroOptimizer_Stage3", 1)):
        wrapper: Any = type(name, (SimpleNamespace,), {})(
            reduce_and_partition_stream=stream, offload_optimizer=offloads
        )
        order_on_device(wrapper)
        assert wrapper.reduce_and_partition_stream is stream
    on_cpu: Any = type("DeepSpeedZeroOptimizer_Stage3", (SimpleNamespace,), {})(
        reduce_and_partition_stream=None, offload_optimizer=False
    )
    order_on_device(on_cpu)
    assert on_cpu.reduce_and_partition_stream is None


def order_reduction() -> list[int]:
    """Launches of a side stream that the main one does not wait for, before and after each wait."""
    import torch

    from tests.fake_gpu import inside

    wrapper_of_stage_3 = type("DeepSpeedZeroOptimizer_Stage3", (SimpleNamespace,), {})
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    numbers, unordered = torch.ones(8, device="cuda"), []
    for offloads in (True, False):
        wrapper = wrapper_of_stage_3(reduce_and_partition_stream=side, offload_optimizer=offloads)
        order_on_device(wrapper)
        with torch.cuda.stream(wrapper.reduce_and_partition_stream):
            assert torch.cuda.current_stream() == side
            numbers += 1
        unordered.append(inside.count_unordered(side, main))
        with inside.counted() as use:
            wrapper.reduce_and_partition_stream.synchronize()
        unordered += [inside.count_unordered(side, main), use.syncs]
    return unordered


@pytest.mark.slow
def test_reduced_gradients_are_waited_for_on_the_card_unless_the_host_computes_with_them() -> None:
    offloaded, ordered = [1, 1, 1], [2, 0, 0]
    assert run_on_fake_gpu(order_reduction) == offloaded + ordered
