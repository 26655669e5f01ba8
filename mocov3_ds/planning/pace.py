"""How long does a step take: operations over reachable rates, bytes over bandwidths, and the wire?

Nothing is assumed to overlap: with chunks there is one reduction at the end of the backward, and
the collectives of batch norm and loss are waited for. So it is an upper bound in that respect.
"""

from dataclasses import dataclass, replace

from mocov3_ds.config.compression import OFF, StepLength, check_patches, count_lengths
from mocov3_ds.model.chunking import shorter_chunks
from mocov3_ds.planning import architecture
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.reach import STREAM
from mocov3_ds.planning.step_setup import Precision, StepSetup
from mocov3_ds.planning.traffic import Collective, plan_collectives
from mocov3_ds.planning.whole_matrices import plan_matrices

IMAGENET = 1_281_167
"""training images of ImageNet-1k: what an epoch means here"""

# BENCHMARKS.md, "Loader: from tars to batches" (original JPEGs, native, colour on the device) and
# "Reading from object storage" (samples by range, crc32 of each)
IMAGE_BYTES = 110_000
DECODE_CPU_S = 0.86e-3
STORAGE_CPU_S = 53e-6

_AROUND_BYTES = 42
"""bytes that DeepSpeed moves around the optimizer's step for each number of a rank's shard: norm,
flatten, cast to fp32, copy back (bf16, read)"""


@dataclass(frozen=True, kw_only=True)
class RunPhase:
    """A part of a run whose steps have the same length."""

    share: float
    """share of the run's steps"""
    length: StepLength
    step_s: float
    """seconds of a step"""
    operations: float
    """what the model asks for in a whole step, all ranks together"""


@dataclass(frozen=True)
class Pace:
    """Time of a step, and what follows from it."""

    compute_s: float
    """seconds of matrix products"""
    elementwise_s: float
    """seconds of norms, activations, residuals"""
    update_s: float
    """seconds of optimizer and momentum encoder, and of adding up the gradients of chunks"""
    collectives: tuple[tuple[Collective, float], ...]
    """each collective and its seconds"""
    batch: int
    """images of all ranks together"""
    operations: float
    """what the model asks for in a whole step, all ranks together"""
    peak_rate: float
    """operations a second of all cards, by their data sheets"""
    phases: tuple[RunPhase, ...] = ()
    """what the run is made of where its sequences are compressed; empty = of steps as this one"""

    @property
    def communication_s(self) -> float:
        """Seconds of all collectives."""
        return sum(seconds for _, seconds in self.collectives)

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.elementwise_s + self.update_s + self.communication_s

    @property
    def mean_step_s(self) -> float:
        """Seconds of a step over the whole run: of this one, or of its phases."""
        return sum(p.share * p.step_s for p in self.phases) if self.phases else self.step_s

    @property
    def images_per_s(self) -> float:
        """Images a second of all cards together."""
        return self.batch / self.step_s

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations reach; recomputation does not count."""
        return self.operations / self.step_s / self.peak_rate

    @property
    def shortest_step_s(self) -> float:
        """Seconds of a step while the sequences are shortest; of this one where they are not."""
        return min((phase.step_s for phase in self.phases), default=self.step_s)

    @property
    def read_mb_per_s(self) -> float:
        """Bytes of JPEG that all ranks read in the shortest steps, 10^6 a second."""
        return self.batch / self.shortest_step_s * IMAGE_BYTES / 1e6

    @property
    def loader_cores(self) -> float:
        """CPU cores that decode and read in the shortest steps, of all machines together."""
        return self.batch / self.shortest_step_s * (DECODE_CPU_S + STORAGE_CPU_S)


def plan_pace(setup: StepSetup, cluster: Cluster) -> Pace:
    """Time of a step of `setup` over whole sequences, and of each phase where they are compressed.

    Args:
        setup: what one rank does in a step.
        cluster: cards and the network between them.
    """
    pace = _plan_step(setup, cluster)
    if setup.compress == OFF:
        return pace
    patches = architecture.patches_of(setup.shape)
    check_patches(setup.compress, patches)
    phases = []
    for length, share in count_lengths(setup.compress, patches).items():
        chunks = shorter_chunks(setup.chunks, setup.images, length.share_of(patches.count))
        step = _plan_step(replace(setup, chunks=chunks), cluster, length)
        phases.append(
            RunPhase(
                share=share,
                length=length,
                step_s=step.step_s,
                operations=step.operations,
            )
        )
    return replace(pace, phases=tuple(phases))


def _plan_step(setup: StepSetup, cluster: Cluster, length: StepLength | None = None) -> Pace:
    """Time of a step of one length."""
    card, shape, number_bytes = cluster.card, setup.shape, setup.number_bytes
    rate = card.peak_rate(setup.precision)
    recomputed = setup.passes.recomputed / setup.passes.forward
    work = architecture.step_work(shape, number_bytes, recomputed, length) * setup.images
    reachable = rate * card.reach.products
    matrices = plan_matrices(setup)
    matrix_rate = card.peak_rate(_product_precision(matrices.dtype, setup)) * card.reach.products
    elementwise = card.elementwise_bandwidth or card.bandwidth * card.reach.elementwise
    shard = architecture.count_trained(shape) / (setup.world_size if setup.stage else 1)
    momentum = architecture.count_momentum_weights(shape)
    updated = shard * (setup.optimizer.bytes_moved() + _AROUND_BYTES)
    updated += momentum * _momentum_bytes(number_bytes) + _added_bytes(setup)
    link, latency = cluster.link_bandwidth, cluster.latency_s
    collectives = tuple(
        (collective, collective.seconds(setup.world_size, link, latency))
        for collective in plan_collectives(setup)
    )
    return Pace(
        compute_s=work.linear / reachable
        + matrices.operations / matrix_rate
        + work.attention / (card.attention_rate or reachable),
        elementwise_s=work.moved / elementwise,
        update_s=updated / (card.bandwidth * STREAM),
        collectives=collectives,
        batch=setup.batch,
        operations=architecture.model_operations(shape, length) * setup.batch,
        peak_rate=rate * setup.world_size,
    )


def _product_precision(dtype: str, setup: StepSetup) -> Precision:
    """Precision in which matrices of a dtype, by torch's name, are multiplied in a step."""
    if dtype == "float32":
        return "tf32" if setup.precision == "tf32" else "fp32"
    return "bf16"


def _momentum_bytes(number_bytes: int) -> int:
    """Bytes of a move for each number: base weight, fp32 master, and a copy if that is not fp32."""
    return number_bytes + 8 + (number_bytes if number_bytes < 4 else 0)


def _added_bytes(setup: StepSetup) -> float:
    """Bytes of adding the gradient of each further pass of a step to those before it."""
    of_backbone = sum(
        tensor.numbers
        for tensor in architecture.list_tensors(setup.shape)
        if tensor.trained and tensor.name.startswith("backbone.")
    )
    of_heads = architecture.count_trained(setup.shape) - of_backbone
    added = (setup.passes.forward - 1) * of_backbone + of_heads  # the heads see each view once
    return 3.0 * setup.number_bytes * added
