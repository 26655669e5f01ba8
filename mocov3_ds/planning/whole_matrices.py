"""What does an optimizer add that works on whole matrices, as Muon: operations, traffic, memory.

The owners of the matrices are those that the optimizer itself would choose with the same options.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch

from mocov3_ds.distributed.segments import Segment, Shape, cut_segments, packed_offsets
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.shapes import VitShape
from mocov3_ds.optim.muon import Muon, count_blocks, matrix_shape, resolve_dtype
from mocov3_ds.optim.owners import (
    Matrix,
    Round,
    assign_owners,
    count_travel,
    list_matrices,
    plan_rounds,
)
from mocov3_ds.optim.rules import Rule, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.planning.architecture import count_trained
from mocov3_ds.planning.step_setup import OptimizerParams, StepSetup

ALIGNMENT = 2
"""numbers of a ZeRO-1/2 partition come in multiples of this (its `nccl_start_alignment_factor`)"""
_DECIDING = ("last_layer", "convolutions", "qkv", "ns_steps", "ns_dtype")
"""params of an optimizer block on which the work depends"""


@dataclass(frozen=True)
class MatrixWork:
    """Work on whole matrices in a step, of the rank that has the most."""

    operations: float = 0.0
    """floating-point operations"""
    exchanges: int = 0
    """calls of all_to_all"""
    numbers: int = 0
    """numbers on the larger side of all of these"""
    memory: int = 0
    """numbers that are held at once for it, beside momentum and gradient"""
    dtype: str = "bfloat16"
    """of all these numbers, by torch's name"""

    @property
    def memory_bytes(self) -> int:
        """Bytes that are held at once for it."""
        return self.memory * (4 if self.dtype == "float32" else 2)


def matrix_params(params: Mapping[str, Any]) -> OptimizerParams:
    """What the work on whole matrices depends on, of the params of an optimizer block."""
    return tuple((key, params[key]) for key in _DECIDING if key in params)


def plan_matrices(setup: StepSetup) -> MatrixWork:
    """Work that the step's optimizer does on whole matrices; none for all but Muon.

    At stage 0 each rank has all matrices and works on all of them.

    Raises:
        ValueError: Muon refuses its options for this network.
    """
    if not issubclass(setup.optimizer, Muon):
        return MatrixWork()
    cut = (setup.stage, setup.world_size)
    return _plan_muon(setup.shape, *cut, setup.optimizer_params, setup.device)


def count_moments(
    optimizer: type[ShardedOptimizer], shape: EncoderShape, params: OptimizerParams = ()
) -> int:
    """Numbers of the state that an optimizer's tensors have, whole: a hidden matrix has one moment.

    A slice of a flat that ZeRO has cut has place for all moments even so.

    Args:
        optimizer: kind of the optimizer.
        shape: network that it trains.
        params: what `matrix_params` kept of its params.

    Raises:
        ValueError: Muon refuses its options for this network.
    """
    if not issubclass(optimizer, Muon):
        return len(optimizer.moments) * count_trained(shape)
    return _count_muon_moments(shape, params)


@lru_cache
def _count_muon_moments(shape: EncoderShape, params: OptimizerParams) -> int:
    muon, shapes = _describe_muon(shape, params)
    return sum(len(muon.moments_of(name)) * prod(shapes[name]) for name in shapes)


def _describe_muon(shape: EncoderShape, params: OptimizerParams) -> tuple[Muon, dict[str, Shape]]:
    with torch.device("meta"):
        named = [(n, p) for n, p in BaseEncoder(shape).named_parameters() if p.requires_grad]
    muon = Muon(named, rule=_rule_of(shape), **dict(params))
    return muon, {name: tuple(parameter.shape) for name, parameter in named}


@lru_cache
def _plan_muon(
    shape: EncoderShape, stage: int, world_size: int, params: OptimizerParams, device: str
) -> MatrixWork:
    muon, shapes = _describe_muon(shape, params)
    works, options = muon.matrix_works(), muon.param_groups[0]
    dtype = str(resolve_dtype(options["ns_dtype"], torch.device(device))).removeprefix("torch.")
    working = {
        name: _count_working(
            *matrix_shape(shapes[name]), count_blocks(name, muon.rules[name], options["qkv"])
        )
        for name in works
    }
    if not stage:  # one after another, each copied from the gradient
        memory = max(prod(shapes[name]) + working[name] for name in works)
        return MatrixWork(sum(works.values()), memory=memory, dtype=dtype)
    if stage == 3:
        segments_by_rank = _cut_each({name: shapes[name] for name in works}, world_size)
    else:
        segments_by_rank = _cut_all(shapes, world_size)
    matrices = assign_owners(list_matrices(works, segments_by_rank), world_size)
    loads = [0.0] * world_size
    for matrix in matrices:
        loads[matrix.owner] += matrix.work
    rounds = plan_rounds(matrices)
    exchanges, numbers = count_travel(rounds, world_size)
    memory = max(_count_memory(chosen, working) for chosen in rounds)
    return MatrixWork(max(loads), exchanges, max(numbers), memory, dtype)


def _rule_of(shape: EncoderShape) -> Any:
    heads = shape.backbone.heads if isinstance(shape.backbone, VitShape) else 0

    def rule(name: str, tensor_shape: Shape) -> Rule:
        is_fused = name.endswith(".attn.qkv.weight")
        return replace(vit_rule(name, tensor_shape), heads=heads if is_fused else 0)

    return rule


def _count_working(rows: int, columns: int, blocks: int) -> int:
    """Numbers that the iteration holds: a matrix before and after a round, two small products."""
    return 2 * rows * columns + 2 * blocks * min(rows // blocks, columns) ** 2


def _count_memory(chosen: Round, working: Mapping[str, int]) -> int:
    """Numbers that the busiest rank of a round holds at once.

    Those are its matrices, and then the largest of three: what it sends to other owners, as slices
    and in one piece, with what arrives; what it has made of earlier matrices, with the iteration on
    one; what it has made of all, the way back in one piece, and what arrives.
    """
    owned: dict[int, list[Matrix]] = {}
    sent: dict[int, int] = {}
    for matrix in chosen:
        owned.setdefault(matrix.owner, []).append(matrix)
        for rank, numbers in matrix.held().items():
            if rank != matrix.owner:
                sent[rank] = sent.get(rank, 0) + numbers
    peaks = [0]
    for rank in {*owned, *sent}:
        matrices, leaving = owned.get(rank, []), sent.get(rank, 0)
        inputs = sum(matrix.numbers for matrix in matrices)
        arriving = inputs - sum(matrix.held().get(rank, 0) for matrix in matrices)
        results, iteration = 0, 0
        for matrix in matrices:
            iteration = max(iteration, results + working[matrix.name])
            results += matrix.numbers
        way_there, way_back = 2 * leaving + arriving, results + arriving + leaving
        peaks.append(inputs + max(way_there, iteration, way_back))
    return max(peaks)


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
        numbers = prod(shape)
        chunk = -(-numbers // world_size)
        for rank in range(-(-numbers // chunk)):
            length = min(chunk, numbers - rank * chunk)
            cuts[rank].append(Segment(name, index, rank * chunk, length, 0))
    return [tuple(segments) for segments in cuts]
