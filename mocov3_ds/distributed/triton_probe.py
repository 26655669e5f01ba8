# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The smallest Triton kernel: what it needs to be built and started, all others need as well."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _store_one(target):
    tl.store(target, 1.0)


def launch_probe(device: torch.device) -> torch.Tensor:
    """Build and start a kernel that makes a 1 of a 0, wait for it, and return that tensor (1,).

    Args:
        device: The device to start it on; the CPU in Triton's interpreter alone.
    """
    one = torch.zeros(1, device=device)
    _store_one[(1,)](one)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return one
