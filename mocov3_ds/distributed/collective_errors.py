"""What an error of a collective or of memory means: its text alone tells.

NCCL has one type of error for everything, and its reason stands in the last lines: under "Last
error:" in the text, where newer ones write the reason of the card or of the network. gloo meets
nothing but the end of other ranks. The texts that the tests hold this to are from public issues.
"""

import re
from typing import NamedTuple

from torch.distributed import DistError

from mocov3_ds.distributed import ranks

_PEER_SIGNS = (
    "remote process exited",
    "ncclRemoteError",
    "aborted",
    "Watchdog caught collective operation timeout",
    "Connection reset",
    "onnection closed",
    "Broken pipe",
)
"""what NCCL says where another rank has ended, or its network"""
_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "Failed to CUDA calloc",
    "Failed to CUDA host alloc",
)
"""what torch, cuBLAS, cuDNN and NCCL say where memory is short"""
_FIRST_LINE = re.compile(
    r"NCCL error(?: in: [^,]*,|:) (?P<kind>[^,(]+)(?: \(run with [^)]*\))?, "
    r"NCCL version (?P<version>[\d.]+)"
)
_TWO_ON_ONE = re.compile(r"Duplicate GPU detected : rank (\d+) and rank (\d+) both on CUDA device")


class Complaint(NamedTuple):
    """What NCCL complains of."""

    sentence: str
    """its own words in one line, the last ones whole"""
    remedy: str
    """what to do; empty = nobody knows"""


def is_peer_failure(error: BaseException) -> bool:
    """Tell whether an error looks like the end of another rank, as a collective meets it.

    Args:
        error: What the main thread of this rank met.
    """
    text = str(error)
    if ranks.world_size() == 1 or is_memory_fault(error):
        return False
    if is_nccl_error(error):
        return any(sign in text for sign in _PEER_SIGNS)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def is_nccl_error(error: BaseException) -> bool:
    """Tell whether NCCL raised an error.

    Args:
        error: What the main thread of this rank met.
    """
    return isinstance(error, RuntimeError) and "NCCL" in str(error)


def is_memory_fault(error: BaseException) -> bool:
    """Tell whether an error means that memory is short: of a device, or of the host.

    Args:
        error: What the main thread of this rank met.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS)
    )


def read_complaint(error: BaseException) -> Complaint:
    """Return what NCCL says, without places in its source, and what to do about it.

    Args:
        error: An error that `is_nccl_error`.
    """
    text = str(error).partition("Exception raised from")[0]
    head, _, last = text.partition("Last error:")
    last = " ".join(last.split())
    first_line = head.strip().partition("\n")[0]
    match = _FIRST_LINE.search(head)
    kind = f"{match['kind'].strip()} (NCCL {match['version']})" if match else first_line
    two = _TWO_ON_ONE.search(text)
    if two:
        remedy = (
            f"ranks {two[1]} and {two[2]} were given one GPU: start one rank for each GPU "
            "(deepspeed --num_gpus, torchrun --nproc-per-node) and let CUDA_VISIBLE_DEVICES show "
            "all of them"
        )
    elif "shared memory segment" in text or "/dev/shm" in text:
        remedy = "give the container more shared memory: docker run --shm-size=8g, or --ipc=host"
    else:
        remedy = "" if last else "NCCL_DEBUG=WARN makes it say more"
    return Complaint(f"{kind}: {last}" if last else kind, remedy)
