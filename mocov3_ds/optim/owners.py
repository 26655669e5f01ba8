"""Who works on which whole matrix, when each rank holds slices of some: a plan all ranks agree on.

Each matrix has one owner. In a round the slices of some matrices travel to their owners, and after
the work, back. Rounds bound the memory: in one of them an owner has as many matrices as fit into
`BUCKET` numbers, and at least one.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mocov3_ds.distributed.segments import Segment

BUCKET = 2**24
"""numbers that an owner may hold at once, 64 MiB in fp32, if they are more than one matrix"""
_SLACK = 1.1
"""how much more than its share a rank may work, where that spares an exchange"""


@dataclass(frozen=True)
class Matrix:
    """A whole matrix that lies in slices on some ranks.

    Attributes:
        name: Name of the tensor in the model.
        numbers: Elements of it.
        work: Operations that it costs its owner.
        slices: Rank and segment of each slice.
        owner: Rank that works on it.
    """

    name: str
    numbers: int
    work: float
    slices: tuple[tuple[int, Segment], ...]
    owner: int = 0

    def held(self) -> dict[int, int]:
        """Rank -> elements that lie there."""
        numbers: dict[int, int] = {}
        for rank, segment in self.slices:
            numbers[rank] = numbers.get(rank, 0) + segment.length
        return numbers


@dataclass(frozen=True)
class Transfer:
    """A slice of a matrix that goes from one rank to another, or stays where it is."""

    source: int
    target: int
    matrix: Matrix
    segment: Segment


Round = tuple[Matrix, ...]


def list_matrices(
    works: Mapping[str, float], segments_by_rank: Sequence[Sequence[Segment]]
) -> list[Matrix]:
    """Put the matrices together from what the ranks hold, in the order of `works`.

    Args:
        works: Name of each matrix -> operations that it costs.
        segments_by_rank: What lies on each rank; other tensors may be among it.
    """
    slices: dict[str, list[tuple[int, Segment]]] = {name: [] for name in works}
    for rank, segments in enumerate(segments_by_rank):
        for segment in segments:
            if segment.name in slices:
                slices[segment.name].append((rank, segment))
    return [
        Matrix(name, sum(segment.length for _, segment in cut), works[name], tuple(cut))
        for name, cut in slices.items()
        if cut
    ]


def assign_owners(matrices: Sequence[Matrix], world_size: int) -> list[Matrix]:
    """Give each matrix an owner: who holds the most of it, as long as the work is balanced.

    The largest comes first. Balanced is a tenth more than a rank's share, or the one largest
    matrix; where nobody who holds a part stays below that, the rank with the least work gets it.

    Args:
        matrices: Matrices whose owners are not chosen yet.
        world_size: Number of ranks that may own some.
    """
    share = sum(matrix.work for matrix in matrices) / world_size
    largest = max((matrix.work for matrix in matrices), default=0.0)
    bound, loads, owned = max(share * _SLACK, largest), [0.0] * world_size, {}
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.work, matrix.name)):
        holders = matrix.held()
        able = [rank for rank in holders if loads[rank] + matrix.work <= bound]
        if able:
            owner = min(able, key=lambda rank: (-holders[rank], loads[rank], rank))
        else:
            owner = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[owner] += matrix.work
        owned[matrix.name] = replace(matrix, owner=owner)
    return [owned[matrix.name] for matrix in matrices]


def plan_rounds(matrices: Sequence[Matrix], bucket: int = BUCKET) -> list[Round]:
    """Order the matrices so that in each round every owner has work and no more than fits.

    Args:
        matrices: Matrices with their owners.
        bucket: Numbers that an owner may hold at once, if they are more than one matrix.
    """
    waiting: dict[int, deque[Matrix]] = {}
    for matrix in matrices:
        waiting.setdefault(matrix.owner, deque()).append(matrix)
    rounds: list[Round] = []
    while any(waiting.values()):
        chosen: list[Matrix] = []
        for queue in waiting.values():
            room = bucket
            while queue and (room == bucket or queue[0].numbers <= room):
                chosen.append(queue.popleft())
                room -= chosen[-1].numbers
        rounds.append(tuple(chosen))
    return rounds


def list_transfers(matrices: Round, *, to_owners: bool) -> list[Transfer]:
    """Slices that travel to the owners of a round's matrices, or back from them.

    Args:
        matrices: Matrices of the round.
        to_owners: Whether they travel to the owners.
    """
    return [
        Transfer(*((rank, m.owner) if to_owners else (m.owner, rank)), m, segment)
        for m in matrices
        for rank, segment in m.slices
    ]


def count_travel(rounds: Sequence[Round], world_size: int) -> tuple[int, list[int]]:
    """What the rounds of a step send, there and back.

    Args:
        rounds: Matrices with their owners.
        world_size: Number of ranks that take part.

    Returns:
        Exchanges, and of each rank the numbers on the larger side of all of them.
    """
    exchanges, numbers = 0, [0] * world_size
    for matrices in rounds:
        sent, received = [0] * world_size, [0] * world_size
        for matrix in matrices:
            for rank, elements in matrix.held().items():
                if rank != matrix.owner:
                    sent[rank] += elements
                    received[matrix.owner] += elements
        exchanges += 2 * any(sent)
        for rank, sides in enumerate(zip(sent, received, strict=True)):
            numbers[rank] += 2 * max(sides)
    return exchanges, numbers
