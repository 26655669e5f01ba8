"""Communication between ranks: the launchers' variables, and every collective on 1 and 3 ranks."""

import os
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.ranks import LAUNCHER_VARIABLES
from tests.fake_gpu.process import run_on_fake_gpu
from tests.ranks_pool import run_ranks

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[MutableMapping[str, str]]:
    """The process's environment without a launcher, and no group that is really joined."""
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    with mock.patch.dict(os.environ):  # all is as before afterwards, whatever the test sets
        for name in (*LAUNCHER_VARIABLES, *SLURM, "SLURM_NTASKS_PER_NODE"):
            os.environ.pop(name, None)
        yield os.environ


def launcher_variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}


def test_a_process_alone_is_rank_0_of_1(environment: MutableMapping[str, str]) -> None:
    ranks.start()
    variables = launcher_variables()
    assert variables.pop("MASTER_PORT")
    assert variables == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"
    }  # fmt: skip


def test_a_task_of_slurm_is_a_rank(environment: MutableMapping[str, str]) -> None:
    environment.update(SLURM)
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set; put export MASTER_ADDR="):
        ranks.start()
    environment["MASTER_ADDR"] = "node1"
    ranks.start()
    assert launcher_variables() == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }  # fmt: skip


def test_half_a_launcher_is_refused(environment: MutableMapping[str, str]) -> None:
    environment.update({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"})
    words = "the launcher set RANK, WORLD_SIZE, MASTER_ADDR but not LOCAL_RANK, MASTER_PORT"
    with pytest.raises(ValueError, match=words):
        ranks.start()


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"])
def test_ranks_of_a_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(other, raising=False)
    assert ranks.local_world_size() == 1
    monkeypatch.setenv(name, "8(x2)")  # as Slurm writes it for uneven nodes
    assert ranks.local_world_size() == 1
    monkeypatch.setenv(name, "4")
    assert ranks.local_world_size() == 4


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", ranks.free_port())) as server:
        assert server.getsockname()[1] > 0


def every_collective() -> dict[str, Any]:
    rank, size = ranks.rank(), ranks.world_size()
    own = torch.tensor([[float(rank), 1.0]], requires_grad=True)
    flat = torch.arange(2.0 * size) + rank
    return {
        "cat": ranks.all_gather_cat(own).tolist(),
        "stack": ranks.all_gather_stack(own[0]).tolist(),
        "gradient": ranks.all_gather_cat(own).requires_grad,
        "sum": ranks.all_reduce_sum(torch.tensor(rank + 1.0)).item(),
        "max": ranks.all_reduce_max(torch.tensor(rank + 1.0)).item(),
        "scatter": ranks.reduce_scatter_sum(flat).tolist(),
        "gather": ranks.all_gather_flat(torch.tensor([rank, -rank])).tolist(),
        "broadcast": ranks.broadcast(torch.tensor(rank + 1), source=size - 1).item(),
        "object": ranks.broadcast_object({"rank": rank}, source=size - 1),
        "objects": ranks.gather_objects(str(rank)),
        "first": ranks.run_on_first(lambda: f"of rank {rank}"),
        "is first": ranks.is_first(),
    }


@pytest.mark.parametrize("size", [1, 3])
def test_collectives(size: int) -> None:
    results = [every_collective()] if size == 1 else run_ranks(size, every_collective)
    sum_of_ranks = size * (size - 1) // 2
    for rank, result in enumerate(results):
        assert result == {
            "cat": [[float(r), 1.0] for r in range(size)],
            "stack": [[float(r), 1.0] for r in range(size)],
            "gradient": False,
            "sum": size * (size + 1) / 2,
            "max": size,
            "scatter": [size * i + sum_of_ranks for i in (2.0 * rank, 2.0 * rank + 1)],
            "gather": [sign * r for r in range(size) for sign in (1, -1)],
            "broadcast": size,
            "object": {"rank": size - 1},
            "objects": [str(r) for r in range(size)],
            "first": "of rank 0",
            "is first": rank == 0,
        }


def failing_first() -> list[str]:
    messages = []
    for error in (ValueError("no such run"), OSError("no room")):

        def work(error: Exception = error) -> None:
            raise error

        try:
            ranks.run_on_first(work)
        except ValueError as raised:
            messages.append(str(raised))
    return messages


def test_all_ranks_hear_why_the_first_failed() -> None:
    assert run_ranks(2, failing_first) == [["no such run", "no room"]] * 2


def timed_calls() -> list[str]:
    calls: list[str] = []

    @contextmanager
    def timed() -> Iterator[None]:
        calls.append("begin")
        yield
        calls.append("end")

    with ranks.timed_collectives(timed):
        total = ranks.all_reduce_sum(torch.ones(1))
        assert total.item() == ranks.world_size()
        ranks.barrier()
    assert calls
    assert calls == ["begin", "end"] * (len(calls) // 2)
    count = len(calls)
    ranks.all_reduce_sum(torch.ones(1))
    assert len(calls) == count  # outside of it nothing is counted
    return calls


def test_collectives_are_timed_while_asked() -> None:
    first, second = run_ranks(2, timed_calls)
    assert len(first) >= 4
    assert len(second) >= 4


class AddUpInBackward(torch.autograd.Function):
    """As batch norm over ranks: the collective of the backward comes from autograd's thread."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return ranks.all_reduce_sum(gradient.clone())


def counts_of_collectives(device: torch.device) -> list[int]:
    x = torch.ones(4, device=device, requires_grad=True)
    counts = [ranks.count_collectives()]
    for work in (
        lambda: ranks.all_reduce_sum(x.detach().clone()),
        lambda: ranks.all_gather_cat(x),
        lambda: torch.autograd.backward(AddUpInBackward.apply(x).sum()),
    ):
        work()
        counts.append(ranks.count_collectives() - counts[0])
    return counts[1:]


def counts_under_gloo() -> tuple[list[int], int]:
    """Also how many are counted while one of them waits for the other rank."""
    counts = counts_of_collectives(torch.device("cpu"))
    begun = ranks.count_collectives()
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    entered = ranks.count_collectives() - begun
    work.wait()
    return counts, entered


def test_collectives_are_counted_as_they_are_entered() -> None:
    assert run_ranks(2, counts_under_gloo) == [([1, 2, 3], 1)] * 2
    assert ranks.count_collectives() == 0


def counts_under_nccl() -> list[int]:
    from tests.fake_gpu import inside

    with inside.pretended_world(8):
        return counts_of_collectives(ranks.start())


@pytest.mark.slow
def test_nccl_counts_them_too() -> None:
    assert run_on_fake_gpu(counts_under_nccl) == [1, 2, 3]
