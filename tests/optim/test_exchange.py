"""Slices of matrices on gloo ranks: owners see their matrices whole, and the results come back."""

from dataclasses import replace

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.optim.exchange import work_on_whole
from mocov3_ds.optim.owners import assign_owners, list_matrices, plan_rounds
from tests.optim.test_owners import NAMES, SHAPES, WORKS, cut
from tests.ranks_pool import run_ranks


def make(index: int) -> Tensor:
    rows, columns = SHAPES[index]
    return torch.arange(1.0, rows * columns + 1) * (index + 1)


def exchange(dtype: torch.dtype, *, scattered: bool = False) -> tuple[list[str], float]:
    """Names of the matrices that this rank worked on, and the error of its slices.

    Scattered, they are all in one round and their owners take turns, so that slices come from two
    ranks at once.
    """
    mine = cut(ranks.world_size())[ranks.rank()]
    values, expected = torch.zeros(sum(s.length for s in mine)), []
    for segment in mine:
        matrix = make(NAMES.index(segment.name))
        segment.of(values).copy_(matrix[segment.start : segment.start + segment.length])
        done = (matrix.to(dtype) - matrix.to(dtype).max()).float()
        expected.append(done[segment.start : segment.start + segment.length])
    seen: list[str] = []

    def work(name: str, x: Tensor) -> Tensor:
        assert torch.equal(x, make(NAMES.index(name)).to(dtype)), name
        seen.append(name)
        return x - x.max()

    matrices = list_matrices(WORKS, ranks.gather_objects(mine))
    rounds = plan_rounds(assign_owners(matrices, ranks.world_size()), bucket=70)
    assert len(rounds) > 1
    if scattered:
        rounds = [tuple(replace(m, owner=i % ranks.world_size()) for i, m in enumerate(matrices))]
    device = torch.device("cpu")
    work_on_whole(rounds, values, work, group=None, device=device, dtype=dtype)
    return seen, float((values - torch.cat(expected)).abs().max())


def exchanges() -> list[tuple[list[str], float]]:
    plain = [exchange(torch.float32), exchange(torch.bfloat16)]
    return [*plain, exchange(torch.float32, scattered=True)]


def test_owners_see_whole_matrices() -> None:
    of_ranks = run_ranks(3, exchanges)
    for number in range(3):
        seen = [name for rank in of_ranks for name in rank[number][0]]
        assert sorted(seen) == sorted(NAMES)
        assert [rank[number][1] for rank in of_ranks] == [0.0] * 3
