"""The choice of kernels: two passes over a flat tensor, one measures, one moves the weights.

Between them lies one all-reduce of three sums per tensor, which makes the norms. Each set of
kernels gives the same results up to the order of summation:

    plain     whole segments and fresh temporaries, any device; what the others are tested against
    blocks    CPU: blocks that stay in the cache, with torch's own fused Adam arithmetic
    triton    CUDA: one launch a pass over all segments of a flat, `triton_kernels`

Bytes per fp32 element on this rank, with w, g, m, v = weight, gradient, first and second moment and
the direction u kept in the gradient's place:

    LAMB    pass 1 reads w g m v, writes m v u; pass 2 reads w u, writes w         40 = the floor
    LARS    pass 1 reads w g; pass 2 reads w g m, writes w m                       28 = the floor
    AdamW   one pass, since nothing must be known beforehand: reads w g m v,
            writes w m v                                                           28 = the floor

A floor is what must move if each value is read once a pass and nothing is recomputed. LAMB cannot
be done in one pass: no weight may move before the norms of the whole tensor are known, and a shard
does not fit in a cache. (Recomputing u from m and v in pass 2 moves 40 bytes, too.) `blocks` moves
the same bytes to and from memory as `triton`; `plain` moves more than twice as much. No set writes
a low-precision copy: DeepSpeed's wrappers make theirs from the fp32 weights after the step in any
case, and a second one would be bytes for nothing.

Kernels look at how many rows `sums_QS` has: 3 are always needed, the RMS of g / sqrt(v) is the
fourth, and with all 8 rows the moments before the step are measured, too. All of it is arithmetic
on values that the pass has read in any case (LARS alone reads m in pass 1 as well, 4 bytes more).
"""

import torch

from mocov3_ds.distributed import devices
from mocov3_ds.optim import plain_kernels
from mocov3_ds.optim.block_kernels import BlockKernels
from mocov3_ds.optim.kernel_types import BACKENDS, Kernels

_BLOCKS = BlockKernels()


def choose_kernels(backend: str, device: torch.device) -> Kernels:
    """Return the kernels that `backend` names, or with "auto" the fastest ones of the device.

    Raises:
        ValueError: An unknown backend, or one that does not run on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if backend == "blocks" and device.type != "cpu":
        raise ValueError(f"backend 'blocks' is for the CPU, the weights are on {device}; use auto.")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        problem = devices.triton_problem(device) if device.type == "cuda" else ""
        if problem and backend == "auto":
            return plain_kernels
        if problem:
            raise ValueError(f"backend 'triton': {problem}; use auto.")
        try:
            from mocov3_ds.optim import triton_kernels
        except ImportError:
            raise ValueError("backend 'triton' needs the triton package; use auto.") from None
        triton_kernels.check_device(device)
        return triton_kernels
    return _BLOCKS if device.type == "cpu" and backend != "plain" else plain_kernels
