"""One step in its variants, side by side: time, memory, and that the loss is the same.

    python -m mocov3_ds.bench step                      small, any machine
    torchrun --nproc-per-node 2 -m mocov3_ds.bench step   the same on ranks, against DDP
    python -m mocov3_ds.bench step --shape vit_b16 --batch 4096 --chunks 32 --variants chunks \
        --precision bf16 --repeats 1 --warmup 0 --no-memory --no-kept
                                                        one whole step at the paper's batch

Variants: `direct` (one pass a view), `joint` (the queries of both views in one pass of twice the
images), `channels_last` (views in that layout, for the patch projection), `compiled` (`direct` with
compiled blocks), `blocks` (each block recomputed), `chunks` (each size of `--chunks` that is
smaller than a rank's batch; with the last chunk kept, and for the last size also with half of them
kept), `plain` (the yardstick: the step of `script_step.py`).

The last column is the share of the rate at which this machine multiplies the network's own
matrices, in the same dtype and run, that the step reaches by the usual count: two operations a
multiply-add, each image's two views forward, backward (twice a forward) and through the momentum
encoder. What a variant computes twice or leaves out does not change the count.

Time is CPU seconds of all threads on the CPU and seconds between synchronisations on a GPU; the
variants take turns. Memory is what the step adds: growth of the resident set during the first step
of a separate process on the CPU, the allocator's peak on a GPU.
"""

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from timm.layers.config import use_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mocov3_ds.bench.random_network import RandomNetwork, draw_views, start_network
from mocov3_ds.bench.resource_use import peak_resident_bytes, resident_bytes, time_call
from mocov3_ds.bench.script_step import build_script_step
from mocov3_ds.distributed import ranks
from mocov3_ds.model.backbones import compile_blocks, recompute_blocks
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.cpu_ops import linear
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape, as_written
from mocov3_ds.settings.wording import count_noun
from mocov3_ds.training.step import NOTHING_DRAWN, Draws, QueriesToLoss

Kind = Literal["direct", "joint", "channels_last", "compiled", "blocks", "chunks", "plain"]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Time and memory of one MoCo v3 step in its variants."""

    shape: Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"] = "vit_s16"
    """backbone of the paper"""
    batch: int = 32
    """global batch over all ranks"""
    chunks: tuple[int, ...] = (4, 8, 16)
    """chunk sizes to compare"""
    variants: tuple[Kind, ...] = (
        *("direct", "joint", "channels_last", "compiled", "blocks", "chunks", "plain"),
    )
    """variants to run, see above"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision of the network"""
    repeats: int = 5
    """timed steps of each variant; the median counts"""
    warmup: int = 1
    """untimed steps of each variant before those"""
    memory: bool = True
    """measure memory as well (a process for each variant on the CPU)"""
    keep_half: Annotated[bool, tyro.conf.arg(name="kept")] = True
    """run the last chunk size also with half of its chunks kept"""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    kind: Kind
    chunks: Chunks = field(default_factory=Chunks)

    @property
    def name(self) -> str:
        """Name in the table."""
        if self.kind == "compiled" and self.chunks.size:
            return f"chunks of {self.chunks.size}, compiled"
        if self.kind != "chunks":
            return {
                "direct": "one pass",
                "joint": "one pass of both views",
                "channels_last": "one pass, channels last",
                "compiled": "one pass, compiled",
                "blocks": "blocks recomputed",
                "plain": "plain",
            }[self.kind]
        suffix = f", {self.chunks.keep} more kept" if self.chunks.keep else ""
        return f"chunks of {self.chunks.size}{suffix}"


class StepCost(NamedTuple):
    """What one step took."""

    seconds: float
    loss: float
    peak_bytes: int
    """on a GPU: largest memory beyond what was allocated before; 0 on a CPU"""


@dataclass
class Measured:
    """What was measured of one variant."""

    seconds: list[float] = field(default_factory=list)
    """of each timed step"""
    loss: float = 0.0
    memory: int | None = None
    """bytes that a step adds; None = not measured"""


def run_bench(options: StepOptions) -> None:
    """Print the table."""
    compare_variants(EncoderShape(backbone=PAPER_SHAPES[options.shape]), options)


def compare_variants(shape: EncoderShape, options: StepOptions) -> None:
    """Run all variants in turns and print the table; all ranks must call.

    Raises:
        ValueError: the batch cannot be shared by the ranks, or no variant is left.
    """
    device = ranks.start()
    start = time.perf_counter()
    rank_batch, remainder = divmod(options.batch, ranks.world_size())
    if remainder:
        raise ValueError(f"--batch {options.batch} cannot be shared by {ranks.world_size()} ranks.")
    variants = list_variants(options)
    if not variants:
        raise ValueError(
            f"no variant is left: a chunk must be smaller than the {rank_batch} images of a rank."
        )
    results = {variant: Measured() for variant in variants}
    if options.memory and device.type == "cpu":
        for variant, measured in results.items():
            measured.memory = measure_memory(shape, options, variant)
    steps = build_steps(shape, options, variants, device)
    rates = []
    for repeat in range(options.warmup + options.repeats):
        for variant, step in steps.items():
            cost = measure_step(step, device)
            results[variant].loss = cost.loss
            if device.type == "cuda":
                results[variant].memory = cost.peak_bytes
            if repeat >= options.warmup:
                results[variant].seconds.append(cost.seconds)
        rates.append(matrix_rate(shape.vit, rank_batch, options.precision, device))
    if ranks.is_first():
        print_table(shape.vit, options, results, max(rates))
        peak_gib = peak_resident_bytes() / 2**30
        print(
            f"\n{time.perf_counter() - start:.0f} s for all of it; peak resident set of this "
            f"process {peak_gib:.2f} GiB"
        )


def print_table(
    vit: VitShape, options: StepOptions, results: dict[Variant, Measured], rate: float
) -> None:
    """Print one row for each variant; for the first rank."""
    device, world = ranks.this_device(), ranks.world_size()
    median = {variant: statistics.median(result.seconds) for variant, result in results.items()}
    yardstick = median.get(Variant("plain"), next(iter(median.values())))
    work = 8 * forward_flops(vit) * options.batch / world
    attention = "fused attention (SDPA)" if use_fused_attn() else "attention written out"
    unit = "CPU s" if device.type == "cpu" else "s"
    print(f"{options.shape}, batch {options.batch} on {count_noun(world, 'rank')}, ", end="")
    print(f"{options.precision}, {device}, median of {options.repeats}, torch {torch.__version__};")
    print(f"{attention}; matrices at {rate / 1e9:.0f} GFLOP/s\n")
    print(f"| variant | {unit} a step | images/s | speed | memory of a step, GiB ", end="")
    print("| first loss | of the matrices' rate |\n|---|---|---|---|---|---|---|")
    for variant, result in results.items():
        seconds = median[variant]
        gib = "" if result.memory is None else f"{result.memory / 2**30:.2f}"
        print(
            f"| {variant.name} | {seconds:.2f} | {options.batch / seconds:.2f} "
            f"| {yardstick / seconds:.2f} | {gib} | {result.loss:.5f} "
            f"| {100 * work / seconds / rate:.0f} % |"
        )


def forward_flops(shape: VitShape) -> float:
    """Operations of one forward pass of one image: patches, blocks (attention scores included)."""
    tokens = (shape.image_size // shape.patch_size) ** 2 + 1
    patches = 2 * (tokens - 1) * 3 * shape.patch_size**2 * shape.dim
    matrices = 24 * tokens * shape.dim**2
    scores = 4 * tokens**2 * shape.dim
    return float(patches + shape.depth * (matrices + scores))


@torch.no_grad()
def matrix_rate(
    vit: VitShape,
    rank_batch: int,
    precision: Literal["fp32", "bf16"],
    device: torch.device,
    time_products: Callable[[Callable[[], object], torch.device], float] = time_call,
) -> float:
    """Operations per second of the four products of a block, and nothing else.

    Args:
        vit: architecture of the backbone.
        rank_batch: images of a rank; at most 64 of them are multiplied.
        precision: dtype of the products.
        device: the device of this rank.
        time_products: returns the seconds of a call.
    """
    rows = min(rank_batch, 64) * ((vit.image_size // vit.patch_size) ** 2 + 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = [(1, 3), (1, 1), (1, 4), (4, 1)]
    pairs = [
        (
            torch.randn(rows, vit.dim * fan_in, device=device, dtype=dtype),
            torch.randn(vit.dim * fan_out, vit.dim * fan_in, device=device, dtype=dtype),
        )
        for fan_in, fan_out in sizes
    ]

    def multiply() -> None:
        for x, weight in pairs:
            linear(x, weight)

    multiply()
    seconds = min(time_products(multiply, device) for _ in range(5))
    return sum(2 * rows * fan_in * fan_out * vit.dim**2 for fan_in, fan_out in sizes) / seconds


def list_variants(options: StepOptions) -> list[Variant]:
    """The variants that the options name, in the table's order; the ranks must have started.

    A chunk that is no smaller than a rank's batch would be one pass under another name.
    """
    batch = options.batch // ranks.world_size()
    sizes = [size for size in options.chunks if size < batch]
    variants = []
    for kind in options.variants:
        if kind != "chunks":
            variants.append(Variant(kind))
            continue
        for size in sizes:
            in_both_views = 2 * -(-batch // size)
            variants.append(Variant(kind, Chunks(size=size)))
            if options.keep_half and size == sizes[-1] and in_both_views >= 4:
                variants.append(Variant(kind, Chunks(size=size, keep=in_both_views // 2 - 1)))
    return variants


# ------------------------------------------------------------------------------ the variants' steps


class QueriesOfEitherWay(QueriesToLoss):
    """The trained module, whose backbone may see both views in one pass."""

    joint = False

    def features(
        self, x1_BCHW: Tensor, x2_BCHW: Tensor, draws: Draws = NOTHING_DRAWN
    ) -> tuple[Tensor, Tensor]:
        """Backbone features (B, D) of both views."""
        if not self.joint:
            return super().features(x1_BCHW, x2_BCHW, draws)
        features1_BD, features2_BD = self.base.backbone(torch.cat([x1_BCHW, x2_BCHW])).chunk(2)
        return features1_BD, features2_BD


def build_steps(
    shape: EncoderShape, options: StepOptions, variants: list[Variant], device: torch.device
) -> dict[Variant, Callable[[], float]]:
    """A function for each variant that runs one step and returns its loss."""
    steps: dict[Variant, Callable[[], float]] = {}
    if any(variant.kind != "plain" for variant in variants):
        settings = {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": options.precision == "bf16"},
        }
        network = start_network(
            shape, settings, batch=options.batch, device=device, module=QueriesOfEitherWay
        )
        if any(variant.kind == "compiled" for variant in variants):
            compile_blocks(network.engine.module.base.backbone)
            compile_blocks(network.momentum_encoder.backbone)
        last = network
        if Variant("channels_last") in variants:  # a copy of all images
            views = [
                x.contiguous(memory_format=torch.channels_last)
                for x in (network.x1_BCHW, network.x2_BCHW)
            ]
            last = RandomNetwork(
                network.engine, network.optimizer, network.momentum_encoder, *views
            )
        for variant in variants:
            if variant.kind != "plain":
                in_layout = last if variant.kind == "channels_last" else network
                steps[variant] = partial(run_variant, in_layout, variant)
    if Variant("plain") in variants:
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        views_BCHW = draw_views(shape, options.batch // ranks.world_size(), dtype, device)
        steps[Variant("plain")] = build_script_step(shape, dtype, device, *views_BCHW)
    return {variant: steps[variant] for variant in variants}


def run_variant(network: RandomNetwork, variant: Variant) -> float:
    """One step of a network in a variant that is not `plain`; returns its loss."""
    module = network.engine.module
    assert isinstance(module, QueriesOfEitherWay)
    module.chunks, module.joint = variant.chunks, variant.kind == "joint"
    backbone = module.base.backbone
    assert isinstance(backbone, VisionTransformer)
    recompute_blocks(backbone, variant.kind == "blocks")
    with nullcontext() if variant.kind == "compiled" else as_written(backbone):
        return network.run_step()


def measure_step(step: Callable[[], float], device: torch.device) -> StepCost:
    """Seconds, loss and (on a GPU) peak memory of a step."""
    losses: list[float] = []
    if device.type == "cpu":
        seconds = time_call(lambda: losses.append(step()), device)
        return StepCost(seconds, losses[0], 0)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    seconds = time_call(lambda: losses.append(step()), device)
    return StepCost(seconds, losses[0], torch.cuda.max_memory_allocated(device) - allocated)


def measure_memory(shape: EncoderShape, options: StepOptions, variant: Variant) -> int:
    """Bytes that the resident set grows by in a first step, in a new process of each rank.

    All ranks must call.
    """
    # the group of the new processes needs a port of its own; the launcher's store belongs to this
    # process and still holds the addresses of its group
    port = ranks.broadcast_object(ranks.free_port())
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_measure_growth, (shape, options, variant, port)))


def _measure_growth(shape: EncoderShape, options: StepOptions, variant: Variant, port: int) -> int:
    torch.set_num_threads(1)
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    device = ranks.start()
    step = build_steps(shape, options, [variant], device)[variant]
    gc.collect()
    start = resident_bytes()
    step()
    return peak_resident_bytes() - start
