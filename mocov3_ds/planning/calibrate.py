"""How fast does this machine multiply, attend and move bytes? Measured in some seconds.

No model is run. The sizes are a ViT-B's, at eight images on a processor and at 64 on a GPU: rates
fall with the size of what is multiplied.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from mocov3_ds.model.cpu_ops import linear

_DIM, _HEADS, _TOKENS = 768, 12, 197
_GPU_IMAGES, _GPU_CALLS = 64, 20

Rates = dict[str, float | int | str]
"""rates by name: operations or bytes a second, and what was measured"""


def calibrate(path: Path, *, seconds: float = 1.0, images: int = 8, tokens: int = _TOKENS) -> Rates:
    """Measure the rates of the processor and write them as JSON.

    Args:
        path: file to write; its folder is made if it does not exist.
        seconds: how long each rate is measured, at least three times in any case.
        images: images of the batch that the operations are as large as.
        tokens: tokens of an image.

    Returns:
        The rates by name, as they stand in the file.

    Raises:
        OSError: `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # first, as measuring takes a while
    rates: Rates = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        **_measure_rates(torch.device("cpu"), torch.float32, images, tokens, seconds),
    }
    path.write_text(json.dumps(rates, indent=2) + "\n")
    return rates


def measure_gpu(device: torch.device, *, seconds: float = 1.0, images: int = _GPU_IMAGES) -> Rates:
    """Measure the rates of a GPU, attention and element-wise kernels in bf16.

    Args:
        device: the device of this rank.
        seconds: how long each rate is measured, at least three times in any case.
        images: images of the batch that the operations are as large as.
    """
    properties = torch.cuda.get_device_properties(device)
    return {
        "machine": properties.name,
        "memory_bytes": properties.total_memory,
        **_measure_rates(device, torch.bfloat16, images, _TOKENS, seconds),
    }


def _measure_rates(
    device: torch.device, dtype: torch.dtype, images: int, tokens: int, seconds: float
) -> dict[str, float]:
    rows = images * tokens
    return {
        "fp32_operations_per_s": _measure_products(device, torch.float32, rows, seconds),
        "bf16_operations_per_s": _measure_products(device, torch.bfloat16, rows, seconds),
        "attention_operations_per_s": _measure_attention(device, dtype, images, tokens, seconds),
        "elementwise_bytes_per_s": _measure_elementwise(device, dtype, rows, seconds),
        "copy_bytes_per_s": _measure_copy(device, seconds),
    }


def _per_second(
    device: torch.device, work: Callable[[], object], amount: float, seconds: float
) -> float:
    """`amount` over the median time of `work`.

    On a processor, time is CPU seconds of the thread that waits for it: the wall clock over a busy
    machine would measure its neighbours; threads that work for torch count for the process, so the
    time is divided by their number. On a GPU it is wall time of a row of calls.

    Args:
        device: the device that `work` runs on.
        work: what is measured; it runs once before.
        amount: operations or bytes of one run.
        seconds: wall time after which the last run starts, once there were three.
    """
    times: list[float] = []
    measure = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    measure(work)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append(measure(work))
    return amount / sorted(times)[len(times) // 2]


def _time_on_cpu(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return (time.process_time() - begin) / torch.get_num_threads()


def _time_on_gpu(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_GPU_CALLS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / _GPU_CALLS


def _measure_products(device: torch.device, dtype: torch.dtype, rows: int, seconds: float) -> float:
    """A linear layer's three products at fc1's size."""
    x = torch.randn(rows, _DIM).to(device, dtype)
    w = torch.randn(4 * _DIM, _DIM).to(device, dtype)
    y = torch.randn(rows, 4 * _DIM).to(device, dtype)
    operations = 3 * 2.0 * rows * _DIM * 4 * _DIM
    return _per_second(
        device, lambda: (linear(x, w), linear(y, w.T), linear(y.T, x.T)), operations, seconds
    )


def _measure_attention(
    device: torch.device, dtype: torch.dtype, images: int, tokens: int, seconds: float
) -> float:
    """Forward and backward: seven products."""
    shape = (images, _HEADS, tokens, _DIM // _HEADS)
    q, k, v = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3))

    def run_both_passes() -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(q, k, v).sum())

    operations = 7 * 2.0 * images * tokens * tokens * _DIM
    return _per_second(device, run_both_passes, operations, seconds)


def _measure_elementwise(
    device: torch.device, dtype: torch.dtype, rows: int, seconds: float
) -> float:
    """GELU, norm and residual with their backward, by the bytes that `Work.moved` counts."""
    wide = torch.randn(rows, 4 * _DIM).to(device, dtype).requires_grad_()
    x = torch.randn(rows, _DIM).to(device, dtype).requires_grad_()
    weight = torch.ones(_DIM).to(device, dtype).requires_grad_()

    def run_both_passes() -> None:
        torch.autograd.backward(F.gelu(wide).sum())
        torch.autograd.backward((x + F.layer_norm(x, (_DIM,), weight, weight)).sum())

    # GELU 8 + 12, norm 2 + 4, residual 3 + 3 numbers a feature
    moved = (20 + 6 + 6) * float(x.element_size()) * rows * _DIM
    return _per_second(device, run_both_passes, moved, seconds)


def _measure_copy(device: torch.device, seconds: float) -> float:
    source = torch.randn(1 << 24).to(device)
    target = torch.empty_like(source)
    return _per_second(device, lambda: target.copy_(source), 2.0 * source.nbytes, seconds)
