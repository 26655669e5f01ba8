# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The smallest Triton kernel: what it needs to be built and started, all others need as well."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _store_one(target):
    tl.store(target, 1.0)


def launch_probe(device: torch.device) -> None:
    """Build and start a kernel of one element, and wait for it.

    Args:
        device: A CUDA device.
    """
    _store_one[(1,)](torch.zeros(1, device=device))
    torch.cuda.synchronize(device)
