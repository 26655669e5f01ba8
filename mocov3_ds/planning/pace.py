"""How long a step takes: operations over reachable rates, bytes over bandwidths, and the wire.

Nothing is assumed to overlap: with chunks there is one reduction at the end of the backward, and
the collectives of batch norm and loss are waited for. So it is an upper bound in that respect.
"""

from dataclasses import dataclass

from mocov3_ds.model.base_encoder import Chunks, EncoderShape
from mocov3_ds.planning import architecture, traffic
from mocov3_ds.planning.hardware import MOVES, Cluster
from mocov3_ds.planning.traffic import Collective, Passes
from mocov3_ds.training.step import kept_of_each_view

IMAGENET = 1_281_167
"""training images of ImageNet-1k: what an epoch means here"""

# BENCHMARKS.md, "Loader: from tars to batches" (original JPEGs, native, colour on the device) and
# "Reading from object storage" (samples by range, crc32 of each)
IMAGE_BYTES = 110_000
DECODE_CPU_S = 0.86e-3
STORAGE_CPU_S = 53e-6

_UPDATE_BYTES = {"adamw": 28, "lamb": 40, "lars": 28}
"""bytes that the optimizer moves for each number of its shard (BENCHMARKS.md, "Optimizer step")"""
_AROUND_BYTES = 42
"""bytes that DeepSpeed moves around it: norm, flatten, cast to fp32, copy back (bf16, read)"""


@dataclass(frozen=True)
class Pace:
    """Time of a step, and what follows from it. Seconds, unless named otherwise."""

    compute: float
    """matrix products"""
    memory: float
    """norms, activations, residuals"""
    update: float
    """optimizer and momentum encoder"""
    wire: tuple[tuple[Collective, float], ...]
    """each collective and its time"""
    batch: int
    operations: float
    """that the model asks for, of the whole step"""
    peak: float
    """operations a second of all cards"""

    @property
    def communication(self) -> float:
        """All collectives."""
        return sum(seconds for _, seconds in self.wire)

    @property
    def step(self) -> float:
        """The whole step."""
        return self.compute + self.memory + self.update + self.communication

    @property
    def images_per_s(self) -> float:
        """Of all cards together."""
        return self.batch / self.step

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations reach; recomputation does not count."""
        return self.operations / self.step / self.peak

    @property
    def read_mb_per_s(self) -> float:
        """Bytes of JPEG that all ranks read, 10^6 a second."""
        return self.images_per_s * IMAGE_BYTES / 1e6

    @property
    def loader_cores(self) -> float:
        """CPU cores that decode and read, of all machines together."""
        return self.images_per_s * (DECODE_CPU_S + STORAGE_CPU_S)

    def hours(self, epochs: float, samples: int = IMAGENET) -> float:
        """Hours for so many epochs."""
        return epochs * (samples // self.batch) * self.step / 3600


def passes_of(chunks: Chunks, images: int, *, recompute_blocks: bool) -> Passes:
    """How often a rank walks through its backbone, both views together."""
    if not chunks.size or chunks.size >= images:
        return Passes(forward=2, recomputed=2 * recompute_blocks)
    of_a_view = -(-images // chunks.size)
    again = 2 * of_a_view - sum(kept_of_each_view(chunks, images))
    return Passes(forward=2 * of_a_view, recomputed=again + 2 * of_a_view * recompute_blocks)


def of_a_step(
    shape: EncoderShape,
    cluster: Cluster,
    *,
    stage: int,
    batch: int,
    precision: str,
    optimizer: str,
    chunks: Chunks,
    recompute_blocks: bool = False,
    persistence: int = traffic.PERSISTENCE,
    bucket: int = 50_000_000,
) -> Pace:
    """Time of one step on a cluster.

    Args:
        shape: architecture.
        cluster: cards and network.
        stage: of ZeRO.
        batch: global batch.
        precision: fp32, bf16 or fp16.
        optimizer: adamw, lamb or lars.
        chunks: of a rank.
        recompute_blocks: each block is computed again in the backward.
        persistence: `stage3_param_persistence_threshold`.
        bucket: `reduce_bucket_size`.
    """
    card, ranks = cluster.card, cluster.cards
    images = batch // ranks
    size = 4 if precision == "fp32" else 2
    rate = card.full if precision == "fp32" else card.low
    passes = passes_of(chunks, images, recompute_blocks=recompute_blocks)
    work = architecture.step_of_an_image(shape, size, passes.recomputed / passes.forward) * images
    attention = card.attention or rate * card.reach
    trained, momentum = architecture.trained(shape), architecture.momentum_weights(shape)
    shard = trained / (ranks if stage else 1)
    moved = shard * (_UPDATE_BYTES[optimizer] + _AROUND_BYTES) + momentum * (12 + 2 * size)
    collectives = traffic.of_a_step(
        shape,
        stage=stage,
        world_size=ranks,
        batch=batch,
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision],
        passes=passes,
        persistence=persistence,
        bucket=bucket,
    )
    link, latency = cluster.link, cluster.latency
    wire = tuple((call, call.seconds(ranks, link, latency)) for call in collectives)
    return Pace(
        compute=work.linear / (rate * card.reach) + work.attention / attention,
        memory=work.moved / (card.moves or card.bandwidth * MOVES),
        update=moved / (card.bandwidth * MOVES),
        wire=wire,
        batch=batch,
        operations=architecture.model_operations(shape) * batch,
        peak=rate * ranks,
    )
