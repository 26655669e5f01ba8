"""The stand-in itself: it counts, keeps books of memory, and knows where a tensor is."""

from typing import Any

import pytest

from tests.fake_gpu.card import FakeGpu
from tests.fake_gpu.process import run_on_fake_gpu

pytestmark = pytest.mark.slow


def small_work() -> dict[str, Any]:
    import torch

    from tests.fake_gpu import inside

    found: dict[str, Any] = {"name": torch.cuda.get_device_name()}
    cuda = torch.device("cuda")
    torch.ones(2, 2, device=cuda) @ torch.ones(2, 2, device=cuda)  # makes scratch memory
    before = torch.cuda.memory_allocated()
    with inside.counted() as use:
        x = torch.ones(1000, 1000, device=cuda)
        y = x @ x + x
        numbers = torch.tensor([3.0, 4.0], device=cuda)
        found["kept"] = numbers.tolist()  # from the host, and no kernel since
        found["lost"] = (numbers + 1).tolist()
    found |= {"launches": use.launches, "products": use.products, "syncs": use.syncs}
    found |= {
        "copies": (use.to_device, use.to_host),
        "allocated": use.allocated_gb * 2**30 - before,
    }
    del x, y
    with inside.counted() as use, pytest.raises(RuntimeError):
        torch.add(numbers, torch.ones(2))  # one of them is on the CPU
    total = torch.cuda.mem_get_info()[1]
    with inside.counted() as use, pytest.raises(torch.OutOfMemoryError):
        torch.empty(total, dtype=torch.uint8, device=cuda)
    found["retries"] = use.retries
    torch.empty(total // 2, dtype=torch.uint8, device=cuda)
    inside.set_card("CAPABILITY", 70)
    with pytest.raises(RuntimeError, match="no kernel image"):
        numbers + 1
    return found


def test_it_counts_and_has_an_end_to_its_memory() -> None:
    found = run_on_fake_gpu(small_work, gpu=FakeGpu(memory_gb=4, held_gb=1, name="Imaginary"))
    assert found["name"] == "Imaginary" and found["retries"] == 1
    assert found["kept"] == [3, 4] and found["lost"] == [0, 0]
    # ones, product, sum, sum
    assert found["products"] == 1 and found["launches"] == 4
    assert found["copies"] == (1, 2) and found["syncs"] == 3
    assert found["allocated"] == pytest.approx(3 * 4e6, rel=0.02)
