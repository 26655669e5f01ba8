"""What the ranks say to each other in one step: each collective, its calls and its payload.

The payload is the larger side of a collective: the whole tensor of an all-reduce, what all ranks
together hold of a gather, what a reduce-scatter is given. What crosses a link depends on the
algorithm and is `Collective.wire_bytes`: a ring passes 2 (n - 1) / n of the payload through each
rank's link for an all-reduce, (n - 1) / n for the halves of it.

The counts are those of DeepSpeed 0.19 and of `train_step`, once the first two steps are over (in
its first ZeRO-3 compares the order of its modules over the ranks).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.optim.step_tables import EVERYTHING, NORMS, PEAK
from mocov3_ds.planning.architecture import TensorSize, features_of_norms, tensors, trained

BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
PERSISTENCE = 100_000
"""DeepSpeed's default `stage3_param_persistence_threshold`"""
_ALIGNMENT = 2
"""numbers of a ZeRO-1/2 partition come in multiples of this (its `nccl_start_alignment_factor`)"""


@dataclass(frozen=True)
class Collective:
    """All calls of one collective for one purpose in a step, as each rank makes them."""

    purpose: str
    operation: str
    dtype: str
    calls: int
    numbers: int
    """of the larger side, all calls together"""

    @property
    def payload(self) -> int:
        """Bytes of the larger side, all calls together."""
        return self.numbers * BYTES[self.dtype]

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that a ring sends through each rank's link."""
        share = (world_size - 1) / world_size
        return {"all_reduce": 2.0}.get(self.operation, 1.0) * share * self.payload

    def seconds(self, world_size: int, link: float, latency: float) -> float:
        """Time by a ring or a tree, whichever is faster, as NCCL chooses.

        A ring uses each link fully and takes a message from rank to rank; a tree takes a message
        for each doubling of the ranks and moves the whole payload.

        Args:
            world_size: ranks.
            link: bytes a second through a rank's link.
            latency: seconds of a message.
        """
        ways = 2 if self.operation == "all_reduce" else 1
        ring = self.wire_bytes(world_size) / link + self.calls * ways * (world_size - 1) * latency
        steps = ways * math.ceil(math.log2(world_size))
        return min(ring, ways * self.payload / link + self.calls * steps * latency)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a step walks through the backbone with gradients, both views together."""

    forward: int = 2
    recomputed: int = 0


def of_a_step(
    shape: EncoderShape,
    *,
    stage: int,
    world_size: int,
    batch: int,
    dtype: str,
    passes: Passes,
    bucket: int = 50_000_000,
    persistence: int = PERSISTENCE,
    watch: bool = False,
) -> list[Collective]:
    """Collectives of one `train_step`, in the order in which they come.

    Args:
        shape: architecture.
        stage: of ZeRO.
        world_size: ranks.
        batch: global batch.
        dtype: of the network: float32, bfloat16 or float16.
        passes: of the backbone; matter where ZeRO-3 gathers weights for each.
        bucket: `reduce_bucket_size`.
        persistence: `stage3_param_persistence_threshold`; larger tensors are gathered when a pass
            reaches them and let go after it. Counted without DeepSpeed's prefetching, which makes
            fewer gathers of them: exact where each tensor persists, else within 5 % of what
            happens without prefetching and above what happens with it.
        watch: whether the optimizer measures all its signals.
    """
    everything, more = tensors(shape), world_size > 1
    own = sum(tensor.trained for tensor in everything)
    found = []
    if stage == 3 and more:
        found.append(_weights_of_passes(everything, world_size, passes, persistence, dtype))
    if more:
        found += _from_the_loss(shape, world_size, batch, dtype)
    reduced = _padded_each(everything, world_size) if stage == 3 else trained(shape)
    reduction = "reduce_scatter_tensor" if stage == 3 else "all_reduce"
    found.append(
        Collective("gradients", reduction, dtype, _buckets(everything, bucket), reduced),
    )
    if stage in (1, 2) and dtype != "float32":
        found.append(Collective("gradients finite?", "all_reduce", "uint8", 1, 1))
    if stage:
        wide = "float64" if stage == 3 else "float32"
        found.append(Collective("gradient norm", "all_reduce", wide, 1, 1))
    if stage and more:
        sums = PEAK if watch else NORMS
        found.append(Collective("the optimizer's norms", "all_reduce", "float32", 1, sums * own))
    if stage and more and watch:
        rest = EVERYTHING - PEAK
        found.append(Collective("the optimizer's peaks", "all_reduce", "float32", 1, rest * own))
    if stage and more:
        found.append(_updated_weights(everything, stage, world_size, persistence, dtype))
    return [collective for collective in found if collective.calls]


def _from_the_loss(
    shape: EncoderShape, world_size: int, batch: int, dtype: str
) -> list[Collective]:
    """Batch norm, keys and loss; the momentum encoder moves without a word."""
    query, key = features_of_norms(shape), features_of_norms(shape)[:3]
    norms = 2 * (query + key)
    statistics = world_size * sum(2 * features + 1 for features in norms)
    sums = 2 * sum(2 * query)
    return [
        Collective("batch-norm statistics", "all_gather", "float32", len(norms), statistics),
        Collective("keys", "all_gather", dtype, 2, 2 * batch * shape.out),
        Collective("loss", "all_reduce", "float32", 1, 1),
        Collective("batch norm's backward", "all_reduce", "float32", 2 * len(query), sums),
    ]


def _updated_weights(
    everything: Sequence[TensorSize], stage: int, world_size: int, persistence: int, dtype: str
) -> Collective:
    """All that is trained, in one piece; at stage 3 each tensor that stays whole, frozen or not."""
    if stage == 3:
        stay = [tensor for tensor in everything if tensor.numbers <= persistence]
        calls, numbers = len(stay), sum(_padded(tensor, world_size) for tensor in stay)
    else:
        piece = _ALIGNMENT * world_size
        numbers = sum(tensor.numbers for tensor in everything if tensor.trained)
        calls, numbers = 1, -(-numbers // piece) * piece
    return Collective("updated weights", "all_gather_into_tensor", dtype, calls, numbers)


def _padded(tensor: TensorSize, world_size: int) -> int:
    return -(-tensor.numbers // world_size) * world_size


def _padded_each(everything: Sequence[TensorSize], world_size: int) -> int:
    return sum(_padded(tensor, world_size) for tensor in everything if tensor.trained)


def _buckets(everything: Sequence[TensorSize], bucket: int) -> int:
    """Reductions of the gradients: tensors come from the end and fill buckets."""
    count, filled = 0, 0
    for tensor in reversed(everything):
        if tensor.trained:
            if filled and filled + tensor.numbers > bucket:
                count, filled = count + 1, 0
            filled += tensor.numbers
    return count + (filled > 0)


def _weights_of_passes(
    everything: Sequence[TensorSize], world_size: int, passes: Passes, persistence: int, dtype: str
) -> Collective:
    """Gathers of the tensors that do not persist: for each pass, and again for its backward."""
    calls = numbers = 0
    for tensor in everything:
        if tensor.numbers <= persistence:
            continue
        if not tensor.name.startswith("backbone."):
            times = 2 * 2  # heads see each view once and are not recomputed
        else:
            times = passes.forward * (1 + tensor.trained) + passes.recomputed
        calls, numbers = calls + times, numbers + times * _padded(tensor, world_size)
    return Collective("weights of each pass", "all_gather_into_tensor", dtype, calls, numbers)
