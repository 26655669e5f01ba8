"""How fast does this machine multiply, attend and move bytes? Measured in some seconds.

No model is run. The sizes are a ViT-B's at eight images: rates fall with the size of what is
multiplied.
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


def calibrate(
    path: Path, *, seconds: float = 1.0, images: int = 8, tokens: int = _TOKENS
) -> dict[str, float | int | str]:
    """Measure the rates and write them as JSON.

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
    rows = images * tokens
    rates: dict[str, float | int | str] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "fp32_operations_per_s": _measure_products(rows, torch.float32, seconds),
        "bf16_operations_per_s": _measure_products(rows, torch.bfloat16, seconds),
        "attention_operations_per_s": _measure_attention(images, tokens, seconds),
        "elementwise_bytes_per_s": _measure_elementwise(rows, seconds),
        "copy_bytes_per_s": _measure_copy(seconds),
    }
    path.write_text(json.dumps(rates, indent=2) + "\n")
    return rates


def _per_second(work: Callable[[], object], amount: float, seconds: float) -> float:
    """`amount` over the median time of `work`, in CPU seconds of the thread that waits for it.

    The wall clock over a busy machine would measure its neighbours; threads that work for torch
    count for the process, so the time is divided by their number.

    Args:
        work: what is measured; it runs once before.
        amount: operations or bytes of one run.
        seconds: wall time after which the last run starts, once there were three.
    """
    work()
    threads = torch.get_num_threads()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return amount * threads / sorted(times)[len(times) // 2]


def _measure_products(rows: int, dtype: torch.dtype, seconds: float) -> float:
    """A linear layer's three products at fc1's size."""
    x, w = torch.randn(rows, _DIM).to(dtype), torch.randn(4 * _DIM, _DIM).to(dtype)
    y = torch.randn(rows, 4 * _DIM).to(dtype)
    operations = 3 * 2.0 * rows * _DIM * 4 * _DIM
    return _per_second(
        lambda: (linear(x, w), linear(y, w.T), linear(y.T, x.T)), operations, seconds
    )


def _measure_attention(images: int, tokens: int, seconds: float) -> float:
    """Forward and backward: seven products."""
    shape = (images, _HEADS, tokens, _DIM // _HEADS)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def run_both_passes() -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(q, k, v).sum())

    return _per_second(run_both_passes, 7 * 2.0 * images * tokens * tokens * _DIM, seconds)


def _measure_elementwise(rows: int, seconds: float) -> float:
    """GELU, norm and residual with their backward, by the bytes that `Work.moved` counts."""
    wide = torch.randn(rows, 4 * _DIM, requires_grad=True)
    x = torch.randn(rows, _DIM, requires_grad=True)
    weight = torch.ones(_DIM, requires_grad=True)

    def run_both_passes() -> None:
        torch.autograd.backward(F.gelu(wide).sum())
        torch.autograd.backward((x + F.layer_norm(x, (_DIM,), weight, weight)).sum())

    # GELU 8 + 12, norm 2 + 4, residual 3 + 3 numbers a feature
    return _per_second(run_both_passes, (20 + 6 + 6) * 4.0 * rows * _DIM, seconds)


def _measure_copy(seconds: float) -> float:
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    return _per_second(lambda: target.copy_(source), 2.0 * source.nbytes, seconds)
