"""What does a rank hold: item by item, and when is each item alive?

A step has seven phases in which memory may peak; the largest counts:

    keys     the queries are made, a chunk of keys goes through the momentum encoder
    loss     queries meet the keys: what heads and backbone kept is alive, and the logits
    heads    the backward leaves the heads: their gradients are added up over the two views
    turn     the backward reaches the backbone: all that was kept, and a block at work
    middle   the whole gradient has gathered; a chunk is at work, kept ones may remain
    reduce   gradients have moved into a bucket, which is copied to be reduced; the others wait
    update   activations are gone; the optimizer is handed its share of the gradient in fp32
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mocov3_ds.model.chunking import LOGITS_ALIVE, count_kept_chunks
from mocov3_ds.planning import architecture
from mocov3_ds.planning.architecture import TensorSize
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.planning.whole_matrices import count_moments, plan_matrices

Phase = Literal["keys", "loss", "heads", "turn", "middle", "reduce", "update"]
PHASES: tuple[Phase, ...] = ("keys", "loss", "heads", "turn", "middle", "reduce", "update")
_FORWARD: tuple[Phase, ...] = ("keys", "loss", "heads", "turn")
_PREFETCH = 50_000_000
"""weights that ZeRO-3 gathers ahead: DeepSpeed's `stage3_prefetch_bucket_size`"""


@dataclass(frozen=True)
class MemoryItem:
    """Something that takes memory."""

    name: str
    bytes: float
    alive: tuple[Phase, ...] = PHASES
    """phases in which it is held; all of them = it stays from step to step"""


@dataclass(frozen=True)
class Memory:
    """All items that a rank holds."""

    items: tuple[MemoryItem, ...]

    def bytes_in(self, phase: Phase) -> float:
        """Bytes that are alive in a phase."""
        return sum(item.bytes for item in self.items if phase in item.alive)

    @property
    def peak_phase(self) -> Phase:
        """The phase in which most is alive."""
        return max(PHASES, key=self.bytes_in)

    @property
    def peak_bytes(self) -> float:
        """Bytes that are alive in the peak phase: what the card must have."""
        return self.bytes_in(self.peak_phase)

    @property
    def bytes_between_steps(self) -> float:
        """Bytes that stay from step to step."""
        return sum(item.bytes for item in self.items if item.alive == PHASES)


def plan_memory(setup: StepSetup, *, on_demand: bool = False) -> Memory:
    """Memory of one rank.

    Args:
        setup: the step: architecture, ranks, ZeRO stage, chunks, precision.
        on_demand: whether memory counts only once it is written, as on a CPU; False = once it is
            allocated, as on a GPU.
    """
    return Memory(
        (*_resident_items(setup), *_activation_items(setup), *_gradient_items(setup, on_demand))
    )


def _resident_items(setup: StepSetup) -> Iterable[MemoryItem]:
    shape, number_bytes = setup.shape, setup.number_bytes
    weights, trained = architecture.count_weights(shape), architecture.count_trained(shape)
    momentum = architecture.count_momentum_weights(shape)
    shards = setup.world_size if setup.stage else 1
    if setup.stage < 3:
        yield MemoryItem("weights", weights * number_bytes)
    else:
        yield from _zero3_items(setup, architecture.list_tensors(shape))
    # a master of its own, but for whole fp32 weights at stage 0
    has_masters = setup.stage or number_bytes < 4
    yield MemoryItem("fp32 master weights", 4 * trained / shards if has_masters else 0)
    moments = len(setup.optimizer.moments) * trained / shards
    if not setup.stage:  # whole tensors have what they need alone
        moments = count_moments(setup.optimizer, shape, setup.optimizer_params)
    yield MemoryItem("optimizer's moments", 4 * moments)
    yield MemoryItem("whole matrices at work", plan_matrices(setup).memory_bytes, ("update",))
    yield MemoryItem("momentum encoder, fp32", 4 * momentum)
    yield MemoryItem("momentum encoder, copy", momentum * number_bytes if number_bytes < 4 else 0)


def _zero3_items(setup: StepSetup, tensors: Sequence[TensorSize]) -> Iterable[MemoryItem]:
    """ZeRO-3's weights: a rank's share, small tensors whole, and the buffers that stage keeps."""
    numbers = sum(tensor.numbers for tensor in tensors)
    trained = sum(tensor.numbers for tensor in tensors if tensor.trained)
    small = sum(tensor.numbers for tensor in tensors if tensor.numbers <= setup.persistence)
    number_bytes, world_size = setup.number_bytes, setup.world_size
    yield MemoryItem("weights, a share", numbers * number_bytes / world_size)
    yield MemoryItem("weights that stay whole", small * number_bytes)
    yield MemoryItem("gradient, a share", trained * number_bytes / world_size)
    yield MemoryItem("gradient bucket", setup.bucket * number_bytes)
    ahead = min(numbers - small, 2 * _PREFETCH)
    yield MemoryItem("weights gathered for a pass", ahead * number_bytes, (*_FORWARD, "middle"))


def _activation_items(setup: StepSetup) -> Iterable[MemoryItem]:
    shape, number_bytes, images = setup.shape, setup.number_bytes, setup.images
    recompute = setup.recompute_blocks
    per_image = architecture.backbone_bytes(shape, number_bytes, recompute_blocks=recompute)
    chunk = min(setup.chunks.size or images, images)
    # images of both views whose activations stay from forward to backward
    kept_chunks = count_kept_chunks(setup.chunks, images)
    resting = sum(min(count * chunk, images) for count in kept_chunks)
    resting = 2 * images if chunk == images else resting
    recomputed = chunk if resting < 2 * images else 0
    views = 2 * images * architecture.view_bytes(shape, number_bytes)
    yield MemoryItem("views of the images", views)
    features = 2 * images * architecture.feature_width(shape) * number_bytes
    yield MemoryItem("features", features, (*_FORWARD, "middle"))
    heads = 2 * images * architecture.head_bytes(shape, number_bytes)
    yield MemoryItem("heads' activations", heads, ("keys", "loss"))
    head = images * architecture.head_working_bytes(shape, number_bytes)
    yield MemoryItem("head at work", head, ("keys", "loss"))
    logits = LOGITS_ALIVE * 4 * images * min(setup.key_block or setup.batch, setup.batch)
    yield MemoryItem("logits", logits, ("loss",))
    yield MemoryItem("activations of one chunk", chunk * per_image, (*_FORWARD, "middle"))
    yield MemoryItem("activations of kept chunks", (resting - chunk) * per_image, _FORWARD)
    remaining = max(resting - chunk, recomputed) - chunk  # beside the chunk at work
    yield MemoryItem("kept chunks that remain", max(remaining, 0) * per_image, ("middle",))
    working = architecture.working_bytes(shape, number_bytes)
    yield MemoryItem("block at work", chunk * working, ("keys",))
    backward = architecture.backward_bytes(shape, number_bytes, recompute_blocks=recompute)
    yield MemoryItem("block in the backward", chunk * backward, ("turn", "middle"))


def _gradient_items(setup: StepSetup, on_demand: bool) -> Iterable[MemoryItem]:
    stage, number_bytes = setup.stage, setup.number_bytes
    trained = architecture.count_trained(setup.shape)
    tensors = architecture.list_tensors(setup.shape)
    heads = [tensor.numbers for tensor in tensors if "backbone." not in tensor.name]
    if stage < 3:
        yield MemoryItem("gradient of the heads", sum(heads) * number_bytes, ("heads", "turn"))
    # of the second view, and the sum
    yield MemoryItem("largest of it in the making", 2 * max(heads) * number_bytes, ("heads",))
    bucket = min(setup.bucket, trained) if on_demand or not stage else setup.bucket
    if not stage:
        gradient = trained * number_bytes
        in_fp32 = 4 * trained if number_bytes < 4 else 0
        yield MemoryItem("gradient", gradient, ("middle", "reduce", "update"))
        yield MemoryItem("gradients being reduced", gradient, ("reduce",))
        yield MemoryItem("gradient handed on, fp32", in_fp32, ("update",))
        return
    # stage 2 reduces a bucket as soon as it is full, and keeps its own share of the result
    gathered = trained / setup.world_size if stage == 2 else trained
    yield MemoryItem("gradient", gathered * number_bytes, ("middle",))
    if stage < 3:
        allocated: tuple[Phase, ...] = ("heads", "turn", "middle", "reduce")
        yield MemoryItem(
            "gradient bucket", bucket * number_bytes, ("reduce",) if on_demand else allocated
        )
        # tensor by tensor, then in one piece
        shard = 2 * trained * number_bytes / setup.world_size
        yield MemoryItem("gradient of the shard", shard, ("update",))
    waiting = max(trained - bucket, 0) * number_bytes
    yield MemoryItem("gradient that waits", waiting, ("reduce",))
    reducing: tuple[Phase, ...] = ("middle", "reduce") if stage == 2 else ("reduce",)
    yield MemoryItem("gradients being reduced", min(bucket, trained) * number_bytes, reducing)
    share = 4 * trained / setup.world_size if number_bytes < 4 or stage == 3 else 0
    yield MemoryItem("gradient handed on, fp32", share, ("update",))
