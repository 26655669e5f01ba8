"""One step in its variants, side by side: time, memory, and that the loss is the same.

    python -m mocov3_ds.bench step                      small, any machine
    torchrun --nproc-per-node 2 -m mocov3_ds.bench step   the same on ranks, against DDP
    python -m mocov3_ds.bench step --shape vit_b16 --batch 4096 --chunks 32 --variants chunks \
        --precision bf16 --repeats 1 --warmup 0 --no-memory --no-kept
                                                        one whole step at the paper's batch

Variants: `direct` (one pass a view), `joint` (the queries of both views in one pass of twice the
images), `channels_last` (views in that layout, for the patch projection), `compiled` (`direct` with
compiled blocks), `blocks` (each block recomputed), `chunks` (each size given that is smaller than a
rank's batch; with the last chunk kept, and for the last size with half of them kept), `plain` (the
yardstick: the same step without engine or chunks, as a short PyTorch script would write it: torch's
AdamW, autocast for bf16, DDP on several ranks, torch's own choice of products and attention).

The last column is the share of the rate at which this machine multiplies the network's own
matrices, in the same dtype and run, that the step reaches by the usual count: two operations a
multiply-add, each image's two views forward, backward (twice a forward) and through the momentum
encoder; what a variant computes twice or leaves out does not change the count.

Time is CPU seconds of all threads on the CPU and seconds between synchronisations on a GPU; the
variants take turns. Memory is what the step adds: growth of the resident set during the first step
of a process of its own on the CPU, the allocator's peak on a GPU.
"""

import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from timm.layers.config import use_fused_attn
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, start_engine
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.cpu_ops import linear
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape, as_written, build_vit, compile_blocks
from mocov3_ds.optim import AdamW
from mocov3_ds.training.step import QueriesToLoss, train_step

Kind = Literal["direct", "joint", "channels_last", "compiled", "blocks", "chunks", "plain"]


@dataclass(frozen=True, kw_only=True)
class Options:
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
    """which variants"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network"""
    repeats: int = 5
    """timed steps of each variant; the median counts"""
    warmup: int = 1
    """steps of each variant before"""
    memory: bool = True
    """measure memory, too (a process for each variant on the CPU)"""
    kept: bool = True
    """also the last chunk size with half of its chunks kept"""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    kind: Kind
    chunks: Chunks = field(default_factory=Chunks)

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.kind != "chunks":
            return {
                "direct": "one pass",
                "joint": "one pass of both views",
                "channels_last": "one pass, channels last",
                "compiled": "one pass, compiled",
                "blocks": "blocks recomputed",
                "plain": "plain",
            }[self.kind]
        kept = f", {self.chunks.keep} more kept" if self.chunks.keep else ""
        return f"chunks of {self.chunks.size}{kept}"


def main(options: Options) -> None:
    """Print the table."""
    device = ranks.start()
    if options.batch % ranks.world_size():
        raise ValueError(f"--batch {options.batch} cannot be shared by {ranks.world_size()} ranks.")
    variants = wanted(options)
    if not variants:
        raise ValueError(
            f"no variant is left: a chunk must be smaller than the "
            f"{options.batch // ranks.world_size()} images of a rank."
        )
    memory = {}
    if options.memory and device.type == "cpu":
        memory = {variant: in_own_process(options, variant) for variant in variants}
    steps = prepare(options, variants, device)
    started = time.perf_counter()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    losses: dict[Variant, float] = {}
    rates = []
    for repeat in range(options.warmup + options.repeats):
        for variant, step in steps.items():
            took, loss, peak = timed(step, device)
            losses[variant] = loss
            if device.type == "cuda":
                memory[variant] = peak
            if repeat >= options.warmup:
                seconds[variant].append(took)
        rates.append(matrix_rate(options, device))
    wall = time.perf_counter() - started
    if not ranks.is_first():
        return
    median = {variant: statistics.median(times) for variant, times in seconds.items()}
    yardstick = median.get(Variant("plain"), median[variants[0]])
    cpu, world = "CPU s" if device.type == "cpu" else "s", ranks.world_size()
    rate = max(rates)
    work = 8 * forward_flops(PAPER_SHAPES[options.shape]) * options.batch / world
    print(f"{options.shape}, batch {options.batch} on {world} rank{'s' * (world > 1)}, ", end="")
    print(f"{options.precision}, {device}, median of {options.repeats}, torch {torch.__version__};")
    print(f"{attention()}; matrices at {rate / 1e9:.0f} GFLOP/s\n")
    print(f"| variant | {cpu} a step | images/s | speed | memory of a step, GiB ", end="")
    print("| first loss | of the matrices' rate |\n|---|---|---|---|---|---|---|")
    for variant in variants:
        gib = f"{memory[variant] / 2**30:.2f}" if variant in memory else ""
        print(
            f"| {variant.name} | {median[variant]:.2f} | {options.batch / median[variant]:.2f} "
            f"| {yardstick / median[variant]:.2f} | {gib} | {losses[variant]:.5f} "
            f"| {100 * work / median[variant] / rate:.0f} % |"
        )
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{wall:.0f} s for all of it; peak resident set of this process {peak_gib:.2f} GiB")


def attention() -> str:
    """How timm computes attention here."""
    return "fused attention (SDPA)" if use_fused_attn() else "attention written out"


def forward_flops(shape: VitShape) -> float:
    """Operations of one forward pass of one image: patches, blocks (attention scores included)."""
    tokens = (shape.image_size // shape.patch_size) ** 2 + 1
    patches = 2 * (tokens - 1) * 3 * shape.patch_size**2 * shape.dim
    matrices = 24 * tokens * shape.dim**2
    scores = 4 * tokens**2 * shape.dim
    return float(patches + shape.depth * (matrices + scores))


@torch.no_grad()
def matrix_rate(options: Options, device: torch.device) -> float:
    """Operations per second of the four products of a block on a rank's batch, no other work."""
    shape = PAPER_SHAPES[options.shape]
    rows = min(options.batch // ranks.world_size(), 64) * (
        (shape.image_size // shape.patch_size) ** 2 + 1
    )
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    sizes = [(1, 3), (1, 1), (1, 4), (4, 1)]
    pairs = [
        (
            torch.randn(rows, shape.dim * fan_in, device=device, dtype=dtype),
            torch.randn(shape.dim * fan_out, shape.dim * fan_in, device=device, dtype=dtype),
        )
        for fan_in, fan_out in sizes
    ]

    def multiply() -> float:
        for x, weight in pairs:
            linear(x, weight)
        return 0.0

    multiply()
    took = min(timed(multiply, device)[0] for _ in range(5))
    return sum(2 * rows * fan_in * fan_out * shape.dim**2 for fan_in, fan_out in sizes) / took


def wanted(options: Options) -> list[Variant]:
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
            of_both_views = 2 * -(-batch // size)
            variants.append(Variant(kind, Chunks(size=size)))
            if options.kept and size == sizes[-1] and of_both_views >= 4:
                variants.append(Variant(kind, Chunks(size=size, keep=of_both_views // 2 - 1)))
    return variants


def prepare(
    options: Options, variants: list[Variant], device: torch.device
) -> dict[Variant, Callable[[], float]]:
    """A function for each variant that runs one step and returns its loss."""
    shape = EncoderShape(vit=PAPER_SHAPES[options.shape])
    steps: dict[Variant, Callable[[], float]] = {}
    given = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": options.precision == "bf16"}}
    config = engine_config(given, global_batch=options.batch, world_size=ranks.world_size())
    dtype = compute_dtype(config)
    generator = torch.Generator().manual_seed(ranks.rank())
    size = shape.vit.image_size
    x1_BCHW, x2_BCHW = (
        torch.empty(options.batch // ranks.world_size(), 3, size, size, dtype=dtype)
        .normal_(generator=generator)
        .to(device)
        for _ in range(2)
    )
    if any(variant.kind != "plain" for variant in variants):
        torch.manual_seed(0)
        model = QueriesOfEitherWay(BaseEncoder(shape), ContrastiveLoss(0.2))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        engine = start_engine(model.to(device), AdamW(named, lr=0.0), config)
        encoder = MomentumEncoder(shape, device=device, dtype=dtype)
        encoder.start_from(dict(full_tensors(engine.module.base)))
        encoder.follow(engine.module.base)
        if Variant("compiled") in variants:
            compile_blocks(engine.module.base.backbone)
            compile_blocks(encoder.backbone)

        views: dict[Kind, list[Tensor]] = {}
        if Variant("channels_last") in variants:  # a copy of all images
            last = torch.channels_last
            views["channels_last"] = [x.contiguous(memory_format=last) for x in (x1_BCHW, x2_BCHW)]

        def run(variant: Variant) -> float:
            engine.module.chunks = variant.chunks
            engine.module.base.backbone.set_grad_checkpointing(variant.kind == "blocks")
            engine.module.joint = variant.kind == "joint"
            as_it_is = variant.kind == "compiled"
            with nullcontext() if as_it_is else as_written(engine.module.base.backbone):
                x1, x2 = views.get(variant.kind, [x1_BCHW, x2_BCHW])
                return train_step(engine, encoder, x1, x2, momentum=0.99).loss

        for variant in variants:
            if variant.kind != "plain":
                steps[variant] = partial(run, variant)
    if Variant("plain") in variants:
        steps[Variant("plain")] = plain_step(shape, dtype, device, x1_BCHW, x2_BCHW)
    return {variant: steps[variant] for variant in variants}


class QueriesOfEitherWay(QueriesToLoss):
    """The trained module, whose backbone may see both views in one pass."""

    joint = False

    def features(self, x1_BCHW: Tensor, x2_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features (B, D) of both views."""
        if not self.joint:
            return super().features(x1_BCHW, x2_BCHW)
        features1_BD, features2_BD = self.base.backbone(torch.cat([x1_BCHW, x2_BCHW])).chunk(2)
        return features1_BD, features2_BD


def plain_step(
    shape: EncoderShape, dtype: torch.dtype, device: torch.device, x1: Tensor, x2: Tensor
) -> Callable[[], float]:
    """The yardstick: two query and two key passes, autocast, torch's AdamW, batch norm and DDP."""
    torch.manual_seed(0)
    base, key = plain_encoder(shape).to(device), plain_encoder(shape).to(device)
    key.load_state_dict(base.state_dict())
    key.requires_grad_(False)
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    query: nn.Module = TwoViews(base)
    if ranks.world_size() > 1:
        query = nn.parallel.DistributedDataParallel(query)

    def contrast(q: Tensor, k: Tensor) -> Tensor:
        k = ranks.all_gather_cat(F.normalize(k.float(), dim=1))
        logits = F.normalize(q.float(), dim=1) @ k.T / 0.2
        target = torch.arange(len(q), device=q.device) + ranks.rank() * len(q)
        return 0.4 * F.cross_entropy(logits, target)

    def step() -> float:
        with half:
            q1, q2 = query(x1, x2)
            with torch.no_grad():
                for mine, theirs in zip(key.parameters(), base.parameters(), strict=True):
                    mine.mul_(0.99).add_(theirs, alpha=0.01)
                k1 = key.projector(key.backbone(x1))
                k2 = key.projector(key.backbone(x2))
            loss = contrast(q1, k2) + contrast(q2, k1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return float(ranks.all_reduce_sum(loss.detach())) / ranks.world_size()

    return step


def plain_encoder(shape: EncoderShape) -> BaseEncoder:
    """The same weights in timm's own blocks, and torch's batch norm.

    On several CPU ranks the batch norm is ours: torch's SyncBatchNorm knows GPUs alone.
    """
    encoder = BaseEncoder(shape)
    backbone = build_vit(shape.vit)
    backbone.load_state_dict(encoder.backbone.state_dict())
    encoder.backbone = backbone
    alone = ranks.world_size() == 1
    if alone or ranks.this_device().type == "cuda":
        norm = nn.BatchNorm1d if alone else nn.SyncBatchNorm
        for part in (encoder.projector, encoder.predictor):
            for name, child in list(part.named_children()):
                if isinstance(child, BatchNormOverRanks):
                    setattr(part, name, norm(len(child.running_mean)))
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear  # as torch computes it on a CPU
    return encoder


class TwoViews(nn.Module):
    """Queries of both views in one forward, as DDP wants it."""

    def __init__(self, base: BaseEncoder) -> None:
        super().__init__()
        self.base = base

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, P) of two views."""
        return self.base(x1), self.base(x2)


def timed(step: Callable[[], float], device: torch.device) -> tuple[float, float, int]:
    """Seconds, loss and (on a GPU) peak bytes beyond what was there."""
    if device.type == "cpu":
        begin = time.process_time()
        loss = step()
        return time.process_time() - begin, loss, 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    there, begin = torch.cuda.memory_allocated(device), time.perf_counter()
    loss = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - there
    return time.perf_counter() - begin, loss, peak


def in_own_process(options: Options, variant: Variant) -> int:
    """Growth of the resident set during a first step, bytes, in a fresh process of each rank.

    All ranks must call.
    """
    # a launcher's store still holds the addresses of the group before, and belongs to this process
    port = ranks.broadcast_object(ranks.free_port())
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_growth, (options, variant, port)))


def _growth(options: Options, variant: Variant, port: int) -> int:
    torch.set_num_threads(1)
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    device = ranks.start()
    step = prepare(options, [variant], device)[variant]
    gc.collect()
    before = _resident()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def command() -> Any:
    """Entry of `python -m mocov3_ds.bench step`."""
    return main(tyro.cli(Options, prog="python -m mocov3_ds.bench step"))
