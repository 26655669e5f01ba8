"""What do the ranks send each other in one step: each collective, its calls and its payload?

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

from mocov3_ds.optim.kernel_types import EVERYTHING, NORMS, Quantity
from mocov3_ds.planning.architecture import (
    TensorSize,
    batch_norm_features,
    count_trained,
    list_tensors,
)
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.planning.whole_matrices import ALIGNMENT, plan_matrices

_DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "int32": 4, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Collective:
    """All calls of one collective for one purpose in a step, as each rank makes them."""

    purpose: str
    operation: str
    """name of the function of torch.distributed"""
    dtype: str
    calls: int
    numbers: int
    """elements of the larger side, all calls together"""

    @property
    def payload(self) -> int:
        """Bytes of the larger side, all calls together."""
        return self.numbers * _DTYPE_BYTES[self.dtype]

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that a ring sends through each rank's link."""
        share = (world_size - 1) / world_size
        if self.operation == "all_to_all_single":  # what stays on a rank is not in it
            return float(self.payload)
        return {"all_reduce": 2.0}.get(self.operation, 1.0) * share * self.payload

    def seconds(self, world_size: int, link: float, latency: float) -> float:
        """Time by a ring or a tree, whichever is faster, as NCCL chooses.

        A ring uses each link fully and takes a message from rank to rank; a tree takes a message
        for each doubling of the ranks and moves the whole payload.

        Args:
            world_size: number of ranks in the collective.
            link: bytes a second that pass through a rank's link, each way.
            latency: seconds that one message takes, whatever its size.
        """
        ways = 2 if self.operation == "all_reduce" else 1
        ring = self.wire_bytes(world_size) / link + self.calls * ways * (world_size - 1) * latency
        messages = ways * math.ceil(math.log2(world_size))
        tree = ways * self.payload / link + self.calls * messages * latency
        return min(ring, tree)


def plan_collectives(setup: StepSetup, *, signals: bool = False) -> list[Collective]:
    """Collectives of one `train_step`, in the order in which they come.

    Tensors above `setup.persistence` are gathered at ZeRO-3 when a pass reaches them and freed
    after it. They are counted without DeepSpeed's prefetching, which makes fewer gathers of them:
    exact where each tensor persists, else within 5 % of what happens without prefetching and above
    what happens with it.

    Args:
        setup: the step: architecture, ranks, ZeRO stage, chunks, precision.
        signals: whether the optimizer measures all its signals in this step.
    """
    stage, distributed = setup.stage, setup.world_size > 1
    tensors = list_tensors(setup.shape)
    collectives = []
    if stage == 3 and distributed:
        collectives.append(_weights_of_passes(setup, tensors))
    if distributed:
        collectives += _loss_collectives(setup)
    collectives.append(_gradient_reduction(setup, tensors))
    if stage and distributed:  # which also tells whether all gradients are finite
        norm_dtype = "float64" if stage == 3 else "float32"
        collectives.append(Collective("gradient norm", "all_reduce", norm_dtype, 1, 1))
    if not stage and distributed:
        trained = sum(tensor.trained for tensor in tensors)
        collectives.append(Collective("gradients there?", "all_reduce", "int32", 1, trained))
    if stage and distributed:
        matrices = plan_matrices(setup)
        collectives.append(
            Collective(
                *("whole matrices", "all_to_all_single", matrices.dtype),
                *(matrices.exchanges, matrices.numbers),
            )
        )
        collectives += _optimizer_collectives(tensors, signals)
        collectives.append(_updated_weights(setup, tensors))
    return [collective for collective in collectives if collective.calls]


def _loss_collectives(setup: StepSetup) -> list[Collective]:
    """Batch norm, keys and loss; the momentum encoder moves without a collective."""
    query = batch_norm_features(setup.shape)
    key = batch_norm_features(setup.shape, keys=True)
    norms = 2 * (query + key)
    statistics = setup.world_size * sum(2 * features + 1 for features in norms)
    sums = 2 * sum(2 * query)
    keys = 2 * setup.batch * setup.shape.out
    return [
        Collective("batch-norm statistics", "all_gather", "float32", len(norms), statistics),
        Collective("keys", "all_gather", setup.dtype, 2, keys),
        Collective("loss", "all_reduce", "float32", 1, 1),
        Collective("batch norm's backward", "all_reduce", "float32", 2 * len(query), sums),
    ]


def _gradient_reduction(setup: StepSetup, tensors: Sequence[TensorSize]) -> Collective:
    """Whole tensors up to stage 2; at stage 3 each rank is handed its share alone."""
    calls = _count_buckets(tensors, setup.bucket)
    if setup.stage < 3:
        numbers = count_trained(setup.shape)
        return Collective("gradients", "all_reduce", setup.dtype, calls, numbers)
    numbers = sum(_padded_numbers(tensor, setup.world_size) for tensor in tensors if tensor.trained)
    return Collective("gradients", "reduce_scatter_tensor", setup.dtype, calls, numbers)


def _optimizer_collectives(tensors: Sequence[TensorSize], signals: bool) -> list[Collective]:
    """Sums and maxima that the optimizer measures of each trained tensor; whether it took part."""
    trained = sum(tensor.trained for tensor in tensors)
    sums = (1 + (Quantity.PEAK if signals else NORMS)) * trained
    collectives = [Collective("the optimizer's norms", "all_reduce", "float32", 1, sums)]
    if signals:
        peaks = (EVERYTHING - Quantity.PEAK) * trained
        collectives.append(Collective("the optimizer's peaks", "all_reduce", "float32", 1, peaks))
    return collectives


def _updated_weights(setup: StepSetup, tensors: Sequence[TensorSize]) -> Collective:
    """All that is trained, at once; at stage 3 each tensor that stays whole, frozen or not."""
    if setup.stage == 3:
        persistent = [tensor for tensor in tensors if tensor.numbers <= setup.persistence]
        calls = len(persistent)
        numbers = sum(_padded_numbers(tensor, setup.world_size) for tensor in persistent)
    else:
        multiple = ALIGNMENT * setup.world_size
        calls, numbers = 1, -(-count_trained(setup.shape) // multiple) * multiple
    return Collective("updated weights", "all_gather_into_tensor", setup.dtype, calls, numbers)


def _padded_numbers(tensor: TensorSize, world_size: int) -> int:
    return -(-tensor.numbers // world_size) * world_size


def _count_buckets(tensors: Sequence[TensorSize], bucket: int) -> int:
    """Reductions of the gradients: tensors come from the end and fill buckets."""
    count, filled = 0, 0
    for tensor in reversed(tensors):
        if tensor.trained:
            if filled and filled + tensor.numbers > bucket:
                count, filled = count + 1, 0
            filled += tensor.numbers
    return count + (filled > 0)


def _weights_of_passes(setup: StepSetup, tensors: Sequence[TensorSize]) -> Collective:
    """Gathers of the tensors that do not persist: for each pass, and again for its backward."""
    passes, calls, numbers = setup.passes, 0, 0
    for tensor in tensors:
        if tensor.numbers <= setup.persistence:
            continue
        if not tensor.name.startswith("backbone."):
            gathers = 2 * 2  # heads see each view once and are not recomputed
        else:
            gathers = passes.forward * (1 + tensor.trained) + passes.recomputed
        calls += gathers
        numbers += gathers * _padded_numbers(tensor, setup.world_size)
    purpose = "weights of each pass"
    return Collective(purpose, "all_gather_into_tensor", setup.dtype, calls, numbers)
