"""What a rank holds: part by part, and when each part is alive.

A step has seven moments at which memory may peak; the largest counts:

    keys     the queries are made, a chunk of keys goes through the momentum encoder
    loss     queries meet the keys: what heads and backbone kept is there, and the logits
    heads    the backward leaves the heads: their gradients are added up over the two views
    turn     the backward reaches the backbone: all that was kept, and a block at work
    middle   the whole gradient has gathered; a chunk is at work, kept ones may remain
    reduce   gradients have moved into a bucket, which is copied to be reduced; the rest waits
    update   activations are gone; the optimizer is handed its share of the gradient in fp32
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mocov3_ds.model.base_encoder import Chunks, EncoderShape
from mocov3_ds.planning import architecture
from mocov3_ds.planning.architecture import TensorSize
from mocov3_ds.planning.traffic import PERSISTENCE
from mocov3_ds.training.step import kept_of_each_view

Moment = Literal["keys", "loss", "heads", "turn", "middle", "reduce", "update"]
MOMENTS: tuple[Moment, ...] = ("keys", "loss", "heads", "turn", "middle", "reduce", "update")
BUCKET = 50_000_000
"""numbers in flight to be reduced: `reduce_bucket_size` as `engine_config` sets it"""
_PREFETCH = 50_000_000
"""weights that ZeRO-3 gathers ahead: DeepSpeed's `stage3_prefetch_bucket_size`"""
_LOGITS_COPIES = 4
"""fp32 tensors of a view's logits alive at once: one kept for each view, two in the making"""


@dataclass(frozen=True)
class Part:
    """Something that takes memory."""

    name: str
    bytes: float
    alive: tuple[Moment, ...] = MOMENTS


@dataclass(frozen=True)
class Memory:
    """All parts of a rank."""

    parts: tuple[Part, ...]

    def at(self, moment: Moment) -> float:
        """Bytes at a moment."""
        return sum(part.bytes for part in self.parts if moment in part.alive)

    @property
    def peak(self) -> Moment:
        """The moment at which most is alive."""
        return max(MOMENTS, key=self.at)

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.at(self.peak)

    @property
    def between_steps(self) -> float:
        """Bytes that stay from step to step."""
        return sum(part.bytes for part in self.parts if part.alive == MOMENTS)


def of_a_rank(
    shape: EncoderShape,
    *,
    stage: int,
    world_size: int,
    batch: int,
    size: int,
    chunks: Chunks,
    recompute_blocks: bool = False,
    key_block: int = 0,
    moments: int = 2,
    persistence: int = PERSISTENCE,
    bucket: int = BUCKET,
    on_demand: bool = False,
) -> Memory:
    """Memory of one rank.

    Args:
        shape: architecture.
        stage: of ZeRO.
        world_size: ranks.
        batch: global batch.
        size: bytes of a number of the network (4, or 2 with fp32 masters beside).
        chunks: how the rank's images go through the backbone.
        recompute_blocks: each block is computed again in the backward.
        key_block: keys for which logits exist at once; 0 = all.
        moments: state tensors of the optimizer beside each weight.
        persistence: `stage3_param_persistence_threshold`.
        bucket: `reduce_bucket_size`.
        on_demand: pages are there once they are written, as on a CPU.
    """
    images = batch // world_size
    resident = _resident(shape, stage, world_size, size, moments, persistence, bucket)
    return Memory(
        (
            *resident,
            *_of_the_step(
                shape,
                stage,
                world_size,
                batch,
                images,
                size,
                chunks,
                recompute_blocks,
                key_block,
                bucket,
                on_demand,
            ),
        )
    )


def _resident(
    shape: EncoderShape,
    stage: int,
    world_size: int,
    size: int,
    moments: int,
    persistence: int,
    bucket: int,
) -> Iterable[Part]:
    everything = architecture.tensors(shape)
    weights, trained = architecture.weights(shape), architecture.trained(shape)
    momentum = architecture.momentum_weights(shape)
    shards = world_size if stage else 1
    if stage < 3:
        yield Part("weights", weights * size)
    else:
        yield from _partitioned(everything, world_size, size, persistence, bucket)
    # a master of its own, but for whole fp32 weights at stage 0
    yield Part("fp32 master weights", 4 * trained / shards if stage or size < 4 else 0)
    yield Part("optimizer's moments", moments * 4 * trained / shards)
    yield Part("momentum encoder, fp32", 4 * momentum)
    yield Part("momentum encoder, copy", momentum * size if size < 4 else 0)


def _partitioned(
    everything: Sequence[TensorSize], world_size: int, size: int, persistence: int, bucket: int
) -> Iterable[Part]:
    """ZeRO-3's weights: its share, small tensors whole, and the buffers that stage keeps."""
    numbers = sum(tensor.numbers for tensor in everything)
    trained = sum(tensor.numbers for tensor in everything if tensor.trained)
    small = sum(tensor.numbers for tensor in everything if tensor.numbers <= persistence)
    yield Part("weights, a share", numbers * size / world_size)
    yield Part("weights that stay whole", small * size)
    yield Part("gradient, a share", trained * size / world_size)
    yield Part("gradient bucket", bucket * size)
    ahead = min(numbers - small, 2 * _PREFETCH)
    yield Part(
        "weights gathered for a pass", ahead * size, ("keys", "loss", "heads", "turn", "middle")
    )


def _of_the_step(
    shape: EncoderShape,
    stage: int,
    world_size: int,
    batch: int,
    images: int,
    size: int,
    chunks: Chunks,
    recompute_blocks: bool,
    key_block: int,
    bucket: int,
    on_demand: bool,
) -> Iterable[Part]:
    per_image = architecture.backbone_bytes(shape, size, recompute_blocks=recompute_blocks)
    piece = min(chunks.size or images, images)
    # images of both views whose activations stay from forward to backward
    kept = sum(min(n * piece, images) for n in kept_of_each_view(chunks, images))
    kept = 2 * images if piece == images else kept
    again = piece if kept < 2 * images else 0
    forward: tuple[Moment, ...] = ("keys", "loss", "heads", "turn")
    yield Part("views of the images", 2 * images * architecture.image_bytes(shape, size))
    yield Part("features", 2 * images * shape.vit.dim * size, (*forward, "middle"))
    heads = 2 * images * architecture.head_bytes(shape, size)
    yield Part("heads' activations", heads, ("keys", "loss"))
    head = images * architecture.head_working_bytes(shape, size)
    yield Part("head at work", head, ("keys", "loss"))
    logits = _LOGITS_COPIES * 4 * images * min(key_block or batch, batch)
    yield Part("logits", logits, ("loss",))
    yield Part("activations of one chunk", piece * per_image, (*forward, "middle"))
    yield Part("activations of kept chunks", (kept - piece) * per_image, forward)
    later = max(kept - piece, again) - piece  # beside one chunk
    yield Part("kept chunks that remain", max(later, 0) * per_image, ("middle",))
    working = architecture.working_bytes(shape, size)
    yield Part("block at work", piece * working, ("keys",))
    back = architecture.backward_bytes(shape, size, recompute_blocks=recompute_blocks)
    yield Part("block in the backward", piece * back, ("turn", "middle"))
    yield from _gradients(shape, stage, world_size, size, bucket, on_demand)


def _gradients(
    shape: EncoderShape, stage: int, world_size: int, size: int, bucket: int, on_demand: bool
) -> Iterable[Part]:
    trained = architecture.trained(shape)
    of_heads = [t.numbers for t in architecture.tensors(shape) if "backbone." not in t.name]
    if stage < 3:
        yield Part("gradient of the heads", sum(of_heads) * size, ("heads", "turn"))
    # of the second view, and the sum
    yield Part("largest of it in the making", 2 * max(of_heads) * size, ("heads",))
    bucket = min(bucket, trained) if on_demand or not stage else bucket
    if not stage:
        yield Part("gradient", trained * size, ("middle", "reduce", "update"))
        yield Part("gradients being reduced", trained * size, ("reduce",))
        yield Part("gradient handed on, fp32", 4 * trained if size < 4 else 0, ("update",))
        return
    # stage 2 reduces a bucket as soon as it is full, and keeps its own share of the result
    whole = trained / world_size if stage == 2 else trained
    yield Part("gradient", whole * size, ("middle",))
    if stage < 3:
        written: tuple[Moment, ...] = ("reduce",)
        if not on_demand:
            written = ("heads", "turn", "middle", "reduce")
        yield Part("gradient bucket", bucket * size, written)
        # tensor by tensor, then in one piece
        yield Part("gradient of the shard", 2 * trained * size / world_size, ("update",))
    yield Part("gradient that waits", max(trained - bucket, 0) * size, ("reduce",))
    during: tuple[Moment, ...] = ("middle", "reduce") if stage == 2 else ("reduce",)
    yield Part("gradients being reduced", min(bucket, trained) * size, during)
    in_fp32 = 4 * trained / world_size if size < 4 or stage == 3 else 0
    yield Part("gradient handed on, fp32", in_fp32, ("update",))
