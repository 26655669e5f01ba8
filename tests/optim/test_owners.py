"""Owners of whole matrices: balanced, where the matrix lies if it can be, in bounded rounds."""

from mocov3_ds.distributed.segments import Segment, cut_segments, packed_offsets
from mocov3_ds.optim.owners import (
    Matrix,
    assign_owners,
    count_travel,
    list_matrices,
    list_transfers,
    plan_rounds,
)

NAMES = [f"m{i}" for i in range(9)]
SHAPES = [(8, 4), (5, 5), (16, 4), (3, 40), (7, 7), (2, 2), (9, 9), (10, 10), (1, 6)]
WORKS = {n: float(r * c * min(r, c)) for n, (r, c) in zip(NAMES, SHAPES, strict=True)}


def cut(world_size: int) -> list[tuple[Segment, ...]]:
    """What each rank holds of all of them, laid out back to back and cut evenly."""
    total = sum(r * c for r, c in SHAPES)
    size = -(-total // world_size)
    offsets = packed_offsets(SHAPES)
    return [
        cut_segments(NAMES, SHAPES, offsets, rank * size, min((rank + 1) * size, total))
        for rank in range(world_size)
    ]


def test_matrices_are_put_together() -> None:
    matrices = list_matrices({n: WORKS[n] for n in NAMES[1:]}, cut(4))
    assert [m.name for m in matrices] == NAMES[1:]
    for matrix, (rows, columns) in zip(matrices, SHAPES[1:], strict=True):
        assert matrix.numbers == rows * columns == sum(matrix.held().values())


def test_work_is_balanced() -> None:
    for world_size in (1, 2, 3, 4, 7):
        matrices = assign_owners(list_matrices(WORKS, cut(world_size)), world_size)
        loads = [sum(m.work for m in matrices if m.owner == r) for r in range(world_size)]
        share = sum(WORKS.values()) / world_size
        assert max(loads) <= max(1.1 * share, share + max(WORKS.values())), (world_size, loads)


def test_a_matrix_on_one_rank_stays_there_if_the_work_is_balanced() -> None:
    slices = [((rank, Segment(f"m{rank}", 0, 0, 16, 0)),) for rank in range(4)]
    matrices = [Matrix(f"m{rank}", 16, 64.0, held) for rank, held in enumerate(slices)]
    owned = assign_owners(matrices, 4)
    assert [m.owner for m in owned] == [0, 1, 2, 3]
    transfers = list_transfers(tuple(owned), to_owners=True)
    assert all(t.source == t.target for t in transfers)
    crowded = [Matrix(f"m{i}", 16, 64.0, ((0, Segment(f"m{i}", i, 0, 16, 0)),)) for i in range(4)]
    assert sorted(m.owner for m in assign_owners(crowded, 4)) == [0, 1, 2, 3]


def test_rounds_are_bounded_and_everyone_works() -> None:
    matrices = assign_owners(list_matrices(WORKS, cut(3)), 3)
    rounds = plan_rounds(matrices, bucket=100)
    assert sorted(m.name for chosen in rounds for m in chosen) == sorted(NAMES)
    left = {m.name: m for m in matrices}
    for chosen in rounds:
        assert {m.owner for m in chosen} == {m.owner for m in left.values()}
        for owner in {m.owner for m in chosen}:
            mine = [m.numbers for m in chosen if m.owner == owner]
            assert sum(mine) <= 100 or len(mine) == 1
        for matrix in chosen:
            del left[matrix.name]
    assert len(plan_rounds(matrices)) == 1


def test_what_travels_there_comes_back() -> None:
    chosen = tuple(assign_owners(list_matrices(WORKS, cut(4)), 4))
    there = list_transfers(chosen, to_owners=True)
    back = list_transfers(chosen, to_owners=False)
    assert [(t.source, t.target) for t in there] == [(t.target, t.source) for t in back]
    assert all(t.target == t.matrix.owner for t in there)
    assert sum(t.segment.length for t in there) == sum(r * c for r, c in SHAPES)
    exchanges, numbers = count_travel([chosen], 4)
    crossing = [t for t in there if t.source != t.target]
    assert exchanges == 2
    for rank in range(4):
        sent = sum(t.segment.length for t in crossing if t.source == rank)
        received = sum(t.segment.length for t in crossing if t.target == rank)
        assert numbers[rank] == 2 * max(sent, received)
