"""One step in its variants, side by side: time, memory, and that the loss is the same.

    python -m mocov3_ds.bench step                      small, any machine
    python -m mocov3_ds.bench step --shape vit_b16 --batch 4096 --chunks 16 --variants chunks \
        --precision bf16 --repeats 1 --warmup 0         one whole step at the paper's batch

Variants: `direct` (one pass a view), `blocks` (each block recomputed), `chunks` (each size given;
with the last chunk kept, and with half of them kept), `plain` (the yardstick: the same step without
an engine or chunks, as a short PyTorch script would write it).

Time is CPU seconds of all threads on the CPU and seconds between synchronisations on a GPU; the
variants take turns. Memory is what the step adds: growth of the resident set in a process of its
own on the CPU, the allocator's peak on a GPU.
"""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import compute_dtype, engine_config, full_tensors, start_engine
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.moco import BaseEncoder, Chunks, EncoderShape
from mocov3_ds.model.momentum import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES
from mocov3_ds.optim import AdamW
from mocov3_ds.step import QueriesToLoss, train_step

Kind = Literal["direct", "blocks", "chunks", "plain"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time and memory of one MoCo v3 step in its variants."""

    shape: Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"] = "vit_s16"
    """backbone of the paper"""
    batch: int = 32
    """global batch, on one rank"""
    chunks: tuple[int, ...] = (4, 8, 16)
    """chunk sizes to compare"""
    variants: tuple[Kind, ...] = ("direct", "blocks", "chunks", "plain")
    """which variants"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network"""
    repeats: int = 5
    """timed steps of each variant; the median counts"""
    warmup: int = 1
    """steps of each variant before"""
    memory: bool = True
    """measure memory, too (a process for each variant on the CPU)"""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    kind: Kind
    chunks: Chunks = field(default_factory=Chunks)

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.kind != "chunks":
            return {"direct": "one pass", "blocks": "blocks recomputed", "plain": "plain"}[
                self.kind
            ]
        kept = f", {self.chunks.kept} more kept" if self.chunks.kept else ""
        return f"chunks of {self.chunks.size}{kept}"


def main(options: Options) -> None:
    """Print the table."""
    variants = wanted(options)
    memory = {}
    if options.memory and ranks.this_device().type == "cpu":
        memory = {variant: in_own_process(options, variant) for variant in variants}
    device = ranks.start()
    steps = prepare(options, variants, device)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    losses: dict[Variant, float] = {}
    for repeat in range(options.warmup + options.repeats):
        for variant, step in steps.items():
            took, loss, peak = timed(step, device)
            losses[variant] = loss
            if device.type == "cuda":
                memory[variant] = peak
            if repeat >= options.warmup:
                seconds[variant].append(took)
    median = {variant: statistics.median(times) for variant, times in seconds.items()}
    first = median[variants[0]]
    cpu = "CPU s" if device.type == "cpu" else "s"
    print(f"{options.shape}, batch {options.batch}, {options.precision}, {device}, ", end="")
    print(f"median of {options.repeats}, torch {torch.__version__}\n")
    print(f"| variant | {cpu} a step | ratio | images/s | memory of a step, GiB | first loss |")
    print("|---|---|---|---|---|---|")
    for variant in variants:
        gib = f"{memory[variant] / 2**30:.2f}" if variant in memory else ""
        print(
            f"| {variant.name} | {median[variant]:.2f} | {median[variant] / first:.2f} "
            f"| {options.batch / median[variant]:.2f} | {gib} | {losses[variant]:.5f} |"
        )


def wanted(options: Options) -> list[Variant]:
    """The variants that the options name, in the table's order."""
    variants = []
    for kind in options.variants:
        if kind != "chunks":
            variants.append(Variant(kind))
            continue
        for size in options.chunks:
            of_both_views = 2 * -(-options.batch // size)
            variants.append(Variant(kind, Chunks(size=size)))
            if size == options.chunks[-1] and of_both_views >= 4:
                variants.append(Variant(kind, Chunks(size=size, kept=of_both_views // 2 - 1)))
    return variants


def prepare(
    options: Options, variants: list[Variant], device: torch.device
) -> dict[Variant, Callable[[], float]]:
    """A function for each variant that runs one step and returns its loss."""
    shape = EncoderShape(vit=PAPER_SHAPES[options.shape])
    steps: dict[Variant, Callable[[], float]] = {}
    given = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": options.precision == "bf16"}}
    config = engine_config(given, global_batch=options.batch, world_size=1)
    dtype = compute_dtype(config)
    generator = torch.Generator().manual_seed(0)
    size = shape.vit.image_size
    x1_BCHW, x2_BCHW = (
        torch.empty(options.batch, 3, size, size, dtype=dtype)
        .normal_(generator=generator)
        .to(device)
        for _ in range(2)
    )
    if any(variant.kind != "plain" for variant in variants):
        torch.manual_seed(0)
        model = QueriesToLoss(BaseEncoder(shape), temperature=0.2)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        engine = start_engine(model.to(device), AdamW(named, lr=0.0), config)
        encoder = MomentumEncoder(shape, device=device, dtype=dtype)
        encoder.start_from(dict(full_tensors(engine.module.base)))
        encoder.follow(engine.module.base)

        def run(variant: Variant) -> float:
            engine.module.chunks = variant.chunks
            engine.module.base.backbone.set_grad_checkpointing(variant.kind == "blocks")
            return train_step(engine, encoder, x1_BCHW, x2_BCHW, momentum=0.99).loss

        for variant in variants:
            if variant.kind != "plain":
                steps[variant] = partial(run, variant)
    if Variant("plain") in variants:
        steps[Variant("plain")] = plain_step(shape, dtype, device, x1_BCHW, x2_BCHW)
    return {variant: steps[variant] for variant in variants}


def plain_step(
    shape: EncoderShape, dtype: torch.dtype, device: torch.device, x1: Tensor, x2: Tensor
) -> Callable[[], float]:
    """The yardstick: two query and two key passes, autocast, torch's AdamW and batch norm."""
    torch.manual_seed(0)
    base, key = BaseEncoder(shape), BaseEncoder(shape)
    for module in (base, key):
        for part in (module.projector, module.predictor):
            for name, child in list(part.named_children()):
                if isinstance(child, BatchNormOverRanks):
                    setattr(part, name, nn.BatchNorm1d(len(child.running_mean)))
    key.load_state_dict(base.state_dict())
    base, key = base.to(device), key.to(device).requires_grad_(False)
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def contrast(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T / 0.2
        return 0.4 * F.cross_entropy(logits, torch.arange(len(q), device=q.device))

    def step() -> float:
        with half:
            q1, q2 = base(x1), base(x2)
            with torch.no_grad():
                for mine, theirs in zip(key.parameters(), base.parameters(), strict=True):
                    mine.mul_(0.99).add_(theirs, alpha=0.01)
                k1 = key.projector(key.backbone(x1))
                k2 = key.projector(key.backbone(x2))
            loss = contrast(q1, k2) + contrast(q2, k1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return step


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
    """Growth of the resident set during the second step, bytes, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_growth, (options, variant)))


def _growth(options: Options, variant: Variant) -> int:
    torch.set_num_threads(1)
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
