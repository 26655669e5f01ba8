"""Texts of NCCL, gloo, cuBLAS and cuDNN, as people met them, are told apart by what they mean."""

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from mocov3_ds.distributed import collective_errors, ranks
from mocov3_ds.distributed.collective_errors import is_memory_fault, is_peer_failure, read_complaint

FILE = "../torch/csrc/distributed/c10d"

# with the public issue that shows it
OTHER_RANKS = {
    "NVIDIA/nccl#2076": f"NCCL error in: {FILE}/NCCLUtils.hpp:268, remote process exited or there "
    "was a network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a "
    "network error or a remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call "
    "to recv from 172.16.0.4<33759> failed : Connection reset by peer",
    "NVIDIA/nccl#1514": f"NCCL error in: {FILE}/ProcessGroupNCCL.cpp:1275, internal error, NCCL "
    "version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\nNet : Connection "
    "closed by remote peer user<50260>",
    "NVIDIA/nccl#795": f"NCCL error in: {FILE}/ProcessGroupNCCL.cpp:1269, internal error, NCCL "
    "version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\nNet : Call to recv "
    "from 10.200.84.247<58355> failed : Broken pipe",
    "mlfoundations/open_clip#1087": ": NCCL communicator was aborted on rank 3.  Original reason "
    "for failure was: [Rank 3] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=266392, OpType=ALLGATHER, Timeout(ms)=1800000) ran for 1803169 milliseconds "
    "before timing out.",
    "tatsu-lab/stanford_alpaca#207": "NCCL error: remote process exited or there was a network "
    "error, NCCL version 2.14.3\nncclRemoteError: A call failed possibly due to a network error or "
    "a remote process exiting prematurely.\nLast error:\nNET/IB : Got completion from peer "
    "11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129",
}
OWN_FAULTS = {
    "verl-project/verl#161": (
        f"NCCL error in: {FILE}/NCCLUtils.hpp:275, invalid usage (run with NCCL_DEBUG=WARN for "
        "details), NCCL version 2.20.5\nncclInvalidUsage: This usually reflects invalid usage of "
        "NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA "
        "device 10\n",
        "invalid usage (NCCL 2.20.5): Duplicate GPU detected : rank 1 and rank 0 both on CUDA "
        "device 10",
        "ranks 1 and 0 were given one GPU: start one rank for each GPU",
    ),
    "NVIDIA/nccl#1410": (
        f"NCCL error in: {FILE}/NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO "
        "for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed."
        "\nLast error:\nCuda failure 1 'invalid argument'",
        "unhandled cuda error (NCCL 2.20.5): Cuda failure 1 'invalid argument'",
        "",
    ),
    "vllm-project/vllm#14537": (
        f"NCCL error in: {FILE}/NCCLUtils.hpp:317, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. "
        "socket, malloc) or external library call failed or device error. \nLast error:\nError "
        "while creating shared memory segment /dev/shm/nccl-EoOvZr (size 7340384)",
        "unhandled system error (NCCL 2.21.5): Error while creating shared memory segment "
        "/dev/shm/nccl-EoOvZr (size 7340384)",
        "docker run --shm-size=8g",
    ),
    "NVIDIA/nccl#1241": (
        "NCCL error in: /opt/pytorch/pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1287,"
        " invalid usage, NCCL version 2.17.1\nncclInvalidUsage: This usually reflects invalid "
        "usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 3 and rank 2 both on "
        "CUDA device e2000\nException raised from getNCCLComm at ProcessGroupNCCL.cpp:1287 (most "
        "recent call first):\nframe #0: c10::Error::Error(c10::SourceLocation",
        "invalid usage (NCCL 2.17.1): Duplicate GPU detected : rank 3 and rank 2 both on CUDA "
        "device e2000",
        "ranks 3 and 2 were given one GPU",
    ),
    "pytorch/pytorch#37004": (
        "NCCL error in: ProcessGroupNCCL.cpp:290, unhandled system error, NCCL version 2.4.8",
        "unhandled system error (NCCL 2.4.8)",
        "NCCL_DEBUG=WARN makes it say more",
    ),
}
NCCL_MEMORY = (
    f"NCCL error in: {FILE}/NCCLUtils.cpp:93, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.30.7\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
MEMORY = {
    "torch's allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB"),
    "NVIDIA/nccl#1235": DistBackendError(NCCL_MEMORY),
    "QwenLM/Qwen3#873": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "torch/torch7#780": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "the host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "Python": MemoryError(),
}


@pytest.fixture(autouse=True)
def _eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 8)


@pytest.mark.parametrize("issue", OTHER_RANKS)
def test_the_end_of_another_rank_is_recognised(issue: str) -> None:
    error = DistBackendError(OTHER_RANKS[issue])
    assert is_peer_failure(error) and not is_memory_fault(error)
    if "Last error" in OTHER_RANKS[issue]:
        assert OTHER_RANKS[issue].splitlines()[-1] in read_complaint(error).sentence


def test_gloo_meets_nothing_else() -> None:
    words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    assert is_peer_failure(RuntimeError(f"{words} [127.0.0.1]:29500"))
    assert is_peer_failure(DistNetworkError("recvValue failed on SocketImpl(fd=3)"))
    assert not is_peer_failure(ValueError("gloo is no backend of mine"))


def test_one_rank_alone_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 1)
    assert not any(is_peer_failure(DistBackendError(text)) for text in OTHER_RANKS.values())


@pytest.mark.parametrize("issue", OWN_FAULTS)
def test_the_reason_of_a_fault_is_told_whole(issue: str) -> None:
    text, sentence, remedy = OWN_FAULTS[issue]
    error = DistBackendError(text)
    assert collective_errors.is_nccl_error(error)
    assert not is_peer_failure(error) and not is_memory_fault(error)
    complaint = read_complaint(error)
    assert complaint.sentence == sentence
    assert remedy in complaint.remedy and bool(remedy) == bool(complaint.remedy)


@pytest.mark.parametrize("source", MEMORY)
def test_short_memory_is_no_fault_of_a_peer(source: str) -> None:
    assert is_memory_fault(MEMORY[source]) and not is_peer_failure(MEMORY[source])


def test_a_fault_of_the_program_is_neither() -> None:
    for error in (KeyError("out of memory"), RuntimeError("a and b do not match")):
        assert not is_memory_fault(error) and not is_peer_failure(error)
