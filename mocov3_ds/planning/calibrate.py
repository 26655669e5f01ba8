"""How fast this machine multiplies, attends and moves bytes, in some seconds; no model is run.

The sizes are a ViT-B's at eight images: rates fall with the size of what is multiplied.
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

_ROWS, _DIM, _HEADS, _IMAGES = 8 * 197, 768, 12, 8
_SECONDS = 1.0
"""that each rate is measured for"""


def calibrate(path: Path) -> dict[str, float | int | str]:
    """Measure, write to `path` and return.

    Raises:
        OSError: `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # first, as measuring takes a while
    rates: dict[str, float | int | str] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "fp32_operations_per_s": _matmul(torch.float32),
        "bf16_operations_per_s": _matmul(torch.bfloat16),
        "attention_operations_per_s": _attention(),
        "elementwise_bytes_per_s": _elementwise(),
        "copy_bytes_per_s": _copy(),
    }
    path.write_text(json.dumps(rates, indent=2) + "\n")
    return rates


def _per_second(work: Callable[[], object], amount: float) -> float:
    """`amount` over the median time of `work`, in CPU seconds of the thread that waits for it.

    The wall clock over a busy machine would measure its neighbours; threads that work for torch
    count for the process, so the time is divided by their number.
    """
    work()
    threads = torch.get_num_threads()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times) < 3:
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return amount * threads / sorted(times)[len(times) // 2]


def _matmul(dtype: torch.dtype) -> float:
    """A linear layer's three products at fc1's size."""
    x, w = torch.randn(_ROWS, _DIM).to(dtype), torch.randn(4 * _DIM, _DIM).to(dtype)
    y = torch.randn(_ROWS, 4 * _DIM).to(dtype)
    return _per_second(
        lambda: (linear(x, w), linear(y, w.T), linear(y.T, x.T)), 3 * 2.0 * _ROWS * _DIM * 4 * _DIM
    )


def _attention() -> float:
    """Forward and backward: seven products."""
    shape = (_IMAGES, _HEADS, _ROWS // _IMAGES, _DIM // _HEADS)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def both() -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(q, k, v).sum())

    return _per_second(both, 7 * 2.0 * _ROWS * (_ROWS // _IMAGES) * _DIM)


def _elementwise() -> float:
    """GELU, norm and residual with their backward, by the bytes that `Work.moved` counts."""
    wide = torch.randn(_ROWS, 4 * _DIM, requires_grad=True)
    x = torch.randn(_ROWS, _DIM, requires_grad=True)
    weight = torch.ones(_DIM, requires_grad=True)

    def both() -> None:
        torch.autograd.backward(F.gelu(wide).sum())
        torch.autograd.backward((x + F.layer_norm(x, (_DIM,), weight, weight)).sum())

    # GELU 8 + 12, norm 2 + 4, residual 3 + 3 numbers a feature
    return _per_second(both, (20 + 6 + 6) * 4.0 * _ROWS * _DIM)


def _copy() -> float:
    source = torch.randn(1 << 24)
    there = torch.empty_like(source)
    return _per_second(lambda: there.copy_(source), 2.0 * source.nbytes)
