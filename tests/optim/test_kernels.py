"""Which kernels are chosen for a backend and a device, and what is refused."""

import pytest
import torch

from mocov3_ds.distributed import devices
from mocov3_ds.optim import plain_kernels
from mocov3_ds.optim.block_kernels import BlockKernels
from mocov3_ds.optim.kernel_types import Kernels
from mocov3_ds.optim.kernels import choose_kernels


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", "cpu", BlockKernels()),
        ("blocks", "cpu", BlockKernels()),
        ("plain", "cpu", plain_kernels),
        ("plain", "cuda", plain_kernels),
        ("auto", "xpu", plain_kernels),
    ],
)
def test_choice(backend: str, device: str, expected: Kernels) -> None:
    assert choose_kernels(backend, torch.device(device)) == expected


@pytest.mark.parametrize("problem", ["", "it cannot build its launcher"])
def test_cuda_means_triton_where_it_can_be_used(
    monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    triton_kernels = pytest.importorskip("mocov3_ds.optim.triton_kernels")
    monkeypatch.setattr(devices, "triton_problem", lambda device: problem)
    expected = plain_kernels if problem else triton_kernels
    assert choose_kernels("auto", torch.device("cuda")) is expected
    if problem:
        with pytest.raises(ValueError, match=f"'triton': {problem}; use auto"):
            choose_kernels("triton", torch.device("cuda"))


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cuda", "cpu", "one of auto, plain, blocks, triton"),
        ("blocks", "cuda", "'blocks' is for the CPU"),
        ("triton", "cpu", "'triton' needs"),
    ],
)
def test_impossible_choice(backend: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernels(backend, torch.device(device))
