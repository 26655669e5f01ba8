"""How fast is a GPU at each thing that a run does? Each function measures one and returns findings.

Shape suffixes: V = view, B = images, C H W = image, P = parameters of a view.
"""

import gc
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mocov3_ds.bench import checkpoint, momentum, optimizer
from mocov3_ds.bench.random_network import start_network
from mocov3_ds.bench.resource_use import time_call
from mocov3_ds.bench.step import (
    StepCost,
    StepOptions,
    Variant,
    build_steps,
    matrix_rate,
    measure_step,
)
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.checks.finding import Finding
from mocov3_ds.data import manifest
from mocov3_ds.data.loader import Loader, LoaderSettings
from mocov3_ds.data.views import photometric
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.distributed.engine import release_engine
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.shapes import PAPER_SHAPES
from mocov3_ds.planning import architecture
from mocov3_ds.planning.calibrate import Rates, measure_gpu
from mocov3_ds.planning.measured_card import MeasuredStep, describe_gpu, fit_reach, plan_step
from mocov3_ds.planning.step_setup import StepSetup
from mocov3_ds.training.run_data import network_views

CHUNKS = (16, 32, 64)
"""images of a chunk, the three sizes that steps are timed at"""
IMAGES = 128
"""images of a rank in the steps that are timed"""
_NEAR = 0.2  # of the planner against what was measured
_WARM_UP, _REPEATS = 2, 3
_JPEG_SIZE = (500, 375)  # as most of ImageNet's


@dataclass
class Speeds:
    """What was measured so far, for those that reckon with it."""

    rates: Rates = field(default_factory=dict)
    steps: list[MeasuredStep] = field(default_factory=list)
    """steps as written, not compiled"""
    reach: dict[str, float] = field(default_factory=dict)
    """share of the peak that the planner should reckon with, and its spread"""


def measure_rates(device: torch.device, speeds: Speeds, seconds: float = 1.0) -> list[Finding]:
    """Time products, attention, element-wise kernels and copies.

    Args:
        device: the device of this rank.
        speeds: the rates are kept in it.
        seconds: how long each is measured.
    """
    speeds.rates = measure_gpu(device, seconds=seconds)
    numbers = {n: float(v) for n, v in speeds.rates.items() if n.endswith("_per_s")}
    tera = {n.split("_")[0]: v / 1e12 for n, v in numbers.items() if "operations" in n}
    giga = {n.split("_")[0]: v / 1e9 for n, v in numbers.items() if "bytes" in n}
    listed = [f"{name} {value:.3g} TFLOP/s" for name, value in tera.items()]
    listed += [f"{name} {value:.4g} GB/s" for name, value in giga.items()]
    return [Finding("rates", "pass", ", ".join(listed), "", "", numbers)]


def measure_steps(
    recipe: str,
    device: torch.device,
    speeds: Speeds,
    *,
    compiled: bool,
    images: int = IMAGES,
    chunks: Sequence[int] = CHUNKS,
) -> list[Finding]:
    """Time the step of a recipe at three chunk sizes, in bf16, against the rate of its matrices.

    Args:
        recipe: network of the paper.
        device: the device of this rank.
        speeds: gets the steps, if they are as written.
        compiled: whether the blocks are compiled.
        images: images of a rank.
        chunks: sizes of a chunk that are timed.
    """
    shape, world = EncoderShape(backbone=PAPER_SHAPES[recipe]), ranks.world_size()
    options = StepOptions(shape=recipe, batch=images * world, precision="bf16")  # type: ignore[arg-type]
    kind = "compiled" if compiled else "chunks"
    variants = [Variant("compiled" if compiled else "chunks", Chunks(size=s)) for s in chunks]
    name = f"step, {recipe}" + ", compiled" * compiled
    if compiled and (problem := devices.triton_problem(device)):
        return [Finding(name, "skip", f"Triton does not run here: {problem}")]
    try:
        steps = build_steps(shape, options, variants, device)
        rate = matrix_rate(shape.vit, images, "bf16", device)
    except torch.OutOfMemoryError:
        return [Finding(name, "skip", "does not fit")]
    text, numbers = [], {"matrices, TFLOP/s": rate / 1e12}
    for variant, step in steps.items():
        size, cost = variant.chunks.size, _time_step(step, device)
        if cost is None:
            text.append(f"{size}: does not fit")
            continue
        mfu = architecture.model_operations(shape) * images / cost.seconds / rate
        text.append(f"{size}: {images * world / cost.seconds:.0f} img/s, {100 * mfu:.0f} %")
        numbers |= {f"{kind} {size}, s": cost.seconds, f"{kind} {size}, MFU": mfu}
        numbers[f"{kind} {size}, GiB"] = cost.peak_bytes / 2**30
        if not math.isfinite(cost.loss):
            return [Finding(name, "fail", f"the loss is {cost.loss}", "finite", "", numbers)]
        if not compiled:
            setup = StepSetup(
                shape=shape,
                stage=1,
                world_size=world,
                batch=images * world,
                precision="bf16",
                chunks=variant.chunks,
            )
            speeds.steps.append((setup, cost.seconds))
    del steps
    free_memory()
    expected = f"of {rate / 1e12:.0f} TFLOP/s, its matrices' rate"
    return [Finding(name, "pass", "; ".join(text), expected, "", numbers)]


def _time_step(step: Callable[[], float], device: torch.device) -> StepCost | None:
    """What a step takes, its seconds the median of some; None where it does not fit."""
    try:
        for _ in range(_WARM_UP):
            step()
        costs = [measure_step(step, device) for _ in range(_REPEATS)]
    except torch.OutOfMemoryError:
        return None
    return costs[-1]._replace(seconds=statistics.median(cost.seconds for cost in costs))


def free_memory() -> None:
    """Give back what the last part held, for the next one."""
    gc.collect()
    torch.cuda.empty_cache()


def measure_optimizers(device: torch.device, recipe: str) -> list[Finding]:
    """Time LAMB, AdamW and torch's fused AdamW on a backbone's tensors, by bytes a second."""
    shapes = optimizer.backbone_shapes(recipe)
    count = sum(math.prod(shape) for shape in shapes.values())
    copy = optimizer.copy_bandwidth(device)
    chosen = ("our Lamb, one flat as under ZeRO", "our AdamW", "torch AdamW, fused")
    numbers, text = {"copy, GB/s": copy}, []
    for contender in optimizer.CONTENDERS["elementwise"]:
        if contender.name in chosen:
            times = optimizer.time_turn(contender, shapes, 5, device)
            speed = count * contender.bytes_each / statistics.median(times) / 1e9
            numbers[f"{contender.name}, GB/s"] = speed
            text.append(f"{contender.name} {100 * speed / copy:.0f} %")
    free_memory()
    expected = f"of a copy's {copy:.0f} GB/s"
    return [Finding(f"optimizers, {recipe}", "pass", ", ".join(text), expected, "", numbers)]


def measure_momentum(device: torch.device, recipe: str) -> list[Finding]:
    """Time a move of the momentum encoder in bf16, beside a copy of its masters."""
    moves = momentum.Moves(EncoderShape(backbone=PAPER_SHAPES[recipe]), device, torch.bfloat16)
    move_ms, copy_ms = (
        momentum.milliseconds_per_call(work, 20, device)
        for work in (moves.move_encoder, moves.copy_masters)
    )
    del moves
    free_memory()
    text, numbers = f"{move_ms:.2f} ms", {"ms": move_ms, "copy, ms": copy_ms}
    return [Finding(f"momentum, {recipe}", "pass", text, f"copy {copy_ms:.2f} ms", "", numbers)]


def measure_views(device: torch.device, images: int = 256) -> list[Finding]:
    """Time the colour work of both views of a batch on the device."""
    spec = ViewSpec()
    rows = np.concatenate([draw_views(spec, 0, 0, i, 375, 500)[2] for i in range(images)])
    params_BP = torch.from_numpy(rows)
    crops_BCHW = torch.randint(0, 256, (len(rows), 3, 224, 224), dtype=torch.uint8, device=device)
    make = partial(
        photometric.make_views, crops_BCHW, params_BP, spec.mean, spec.std, torch.bfloat16
    )
    make()
    seconds = statistics.median(time_call(make, device) for _ in range(5))
    rate = images / seconds
    text = f"{rate:.0f} img/s, {1e3 * seconds:.1f} ms for {images}"
    return [Finding("views on the device", "pass", text, "", "", {"images/s": rate})]


def measure_loader(
    device: torch.device, folder: Path, images: int = 256, batch: int = 64, batches: int = 16
) -> list[Finding]:
    """Time the whole way from JPEGs in tars to views on the device, with all cores.

    Args:
        device: the device of this rank.
        folder: folder of this check, the same on all ranks.
        images: different images; they are read again and again.
        batch: images of a rank's batch.
        batches: batches that are timed.
    """
    shards = manifest.load(ranks.run_on_first(partial(_make_jpegs, folder / "loader", images)))
    threads = max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size())
    settings = LoaderSettings(
        views=ViewSpec(),
        image_size=224,
        global_batch=batch * ranks.world_size(),
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        seed=0,
        lanes=ranks.world_size(),
        threads=threads,
        device=device,
    )
    with Loader(shards, settings) as loader:

        def take_batches(count: int) -> None:
            for loaded in islice(loader, count):
                network_views(loaded, settings.views, device, torch.bfloat16, coloured=False)

        take_batches(4)
        seconds = time_call(partial(take_batches, batches), device)
    rate = batches * batch / seconds
    text = f"{rate:.0f} img/s a rank, {threads} threads, JPEGs of {_JPEG_SIZE[0]} pixels"
    numbers = {"images/s": rate, "threads": float(threads)}
    return [Finding("loader to the device", "pass", text, "", "", numbers)]


def _make_jpegs(folder: Path, count: int) -> str:
    """Sharded JPEGs that look like photographs to a decoder: smooth, with some noise."""
    from data_prep.shard import make_shards
    from data_prep.shard_options import ShardOptions
    from data_prep.sources import list_images

    (folder / "images/a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(_JPEG_SIZE, Image.Resampling.BICUBIC))
        noisy = smooth.astype(np.int16) + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"images/a/{number:05d}.jpg", quality=90)
    shards = str(folder / "shards")
    source = list_images(str(folder / "images"))
    make_shards(source, shards, ShardOptions(shard_size="64"), workers=1, quiet=True)
    return shards


def measure_checkpoint(device: torch.device, folder: Path, recipe: str) -> list[Finding]:
    """Time how long the step loop stands still for a save in the background."""
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    shape = EncoderShape(backbone=PAPER_SHAPES[recipe])
    network = start_network(shape, settings, batch=8 * ranks.world_size(), device=device)
    run_step = partial(time_call, network.run_step, device)
    run_step()
    step_s = statistics.median(run_step() for _ in range(3))
    with tempfile.TemporaryDirectory(dir=folder) as run:
        saver = Saver(Path(ranks.broadcast_object(run)), keep=1)
        groups = checkpoint.saved_groups(network)
        cost = checkpoint.measure_save(saver, 1, groups, run_step, step_s, True)
    release_engine(network.engine)
    del network, groups
    free_memory()
    text = f"loop stands still {cost.stall:.2f} s, on disk after {cost.on_disk:.1f} s"
    numbers = {"stall, s": cost.stall, "on disk, s": cost.on_disk}
    return [Finding(f"checkpoint, {recipe}", "pass", text, "", "", numbers)]


def compare_planner(speeds: Speeds) -> list[Finding]:
    """Hold the planner against the steps: by the preset, by the rates, and by the fitted reach.

    Args:
        speeds: rates and steps; gets the reach.
    """
    if not speeds.rates or not speeds.steps:
        return [Finding("planner", "skip", "no rates or no steps were measured")]
    card = describe_gpu(speeds.rates)
    products, spread = fit_reach(card, speeds.steps)
    fitted = replace(card, reach=replace(card.reach, products=products))
    if math.isfinite(spread):
        speeds.reach = {"products": products, "spread": spread}
    findings = []
    for name, planned_card in (("by measured rates", card), ("with the fitted reach", fitted)):
        off = {
            f"{setup.shape.vit.dim} wide, chunks of {setup.chunks.size}": plan_step(
                planned_card, setup
            )
            / seconds
            - 1
            for setup, seconds in speeds.steps
        }
        near = sum(abs(error) <= _NEAR for error in off.values())
        text = f"{near} of {len(off)} steps within {_NEAR:.0%}, "
        text += f"{min(off.values()):+.0%} to {max(off.values()):+.0%}"
        good = near == len(off)
        findings.append(Finding(f"planner {name}", "pass" if good else "note", text, "", "", off))
    share = f"{products:.2f} of the peak, a step within {spread:.2f} x"
    return [*findings, Finding("reach", "pass", share, "", "", dict(speeds.reach))]
