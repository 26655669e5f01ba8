"""What does an optimizer add that works on whole matrices, as Muon does: operations and traffic.

The owners of the matrices are those that the optimizer itself would choose, with its defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from mocov3_ds.distributed.segments import Segment, Shape, cut_segments, packed_offsets
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.optim.muon import Muon
from mocov3_ds.optim.owners import assign_owners, count_travel, list_matrices, plan_rounds
from mocov3_ds.planning.step_setup import StepSetup

ALIGNMENT = 2
"""numbers of a ZeRO-1/2 partition come in multiples of this (its `nccl_start_alignment_factor`)"""


@dataclass(frozen=True)
class MatrixWork:
    """Work on whole matrices in a step, of the rank that has the most."""

    operations: float = 0.0
    """floating-point operations"""
    exchanges: int = 0
    """calls of all_to_all"""
    numbers: int = 0
    """numbers on the larger side of all of these"""


def plan_matrices(setup: StepSetup) -> MatrixWork:
    """Work that the step's optimizer does on whole matrices; none for all but Muon.

    At stage 0 each rank has all matrices and works on all of them.
    """
    if not issubclass(setup.optimizer, Muon):
        return MatrixWork()
    return _plan_muon(setup.shape, setup.stage, setup.world_size)


@lru_cache
def _plan_muon(shape: EncoderShape, stage: int, world_size: int) -> MatrixWork:
    with torch.device("meta"):
        named = [(n, p) for n, p in BaseEncoder(shape).named_parameters() if p.requires_grad]
    works = Muon(named).matrix_works()
    if not stage:
        return MatrixWork(sum(works.values()))
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    if stage == 3:
        segments_by_rank = _cut_each({name: shapes[name] for name in works}, world_size)
    else:
        segments_by_rank = _cut_all(shapes, world_size)
    matrices = assign_owners(list_matrices(works, segments_by_rank), world_size)
    loads = [0.0] * world_size
    for matrix in matrices:
        loads[matrix.owner] += matrix.work
    exchanges, numbers = count_travel(plan_rounds(matrices), world_size)
    return MatrixWork(max(loads), exchanges, max(numbers))


def _cut_all(shapes: Mapping[str, Shape], world_size: int) -> list[tuple[Segment, ...]]:
    """Stages 1 and 2: all tensors one after another, cut evenly."""
    names, sizes = tuple(shapes), list(shapes.values())
    size = -(-sum(map(prod, sizes)) // (ALIGNMENT * world_size)) * ALIGNMENT
    offsets = packed_offsets(sizes)
    return [
        cut_segments(names, sizes, offsets, rank * size, (rank + 1) * size)
        for rank in range(world_size)
    ]


def _cut_each(shapes: Mapping[str, Shape], world_size: int) -> list[tuple[Segment, ...]]:
    """Stage 3: each tensor cut evenly."""
    cuts: list[list[Segment]] = [[] for _ in range(world_size)]
    for index, (name, shape) in enumerate(shapes.items()):
        chunk = -(-prod(shape) // world_size)
        for rank in range(world_size):
            length = min(chunk, prod(shape) - rank * chunk)
            if length > 0:
                cuts[rank].append(Segment(name, index, rank * chunk, length, 0))
    return [tuple(segments) for segments in cuts]
