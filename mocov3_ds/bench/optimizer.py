"""One optimizer step on the tensors of a ViT: ours beside timm's, torch's, DeepSpeed's and apex's.

    python -m mocov3_ds.bench optimizer                                  ViT-B, one CPU thread
    python -m mocov3_ds.bench optimizer --shapes vit_b16 vit_l16 vit_h14 the sizes of the paper
    python -m mocov3_ds.bench optimizer --device cuda                    a GPU, with its bandwidth

Each optimizer updates all trained tensors of the ViT's backbone, unsharded, from the same weights
and gradients. They take turns for several rounds; each turn builds the state anew, so that only one
optimizer's memory is in use, takes one step to warm up and then the timed steps; the median counts.
Time is CPU seconds on the CPU and seconds between synchronisations on a GPU. GB/s are the bytes
that the algorithm must move (LAMB 40 per parameter, LARS and AdamW 28; see optim/kernels.py) over
the time, and "of copy" compares them with a plain copy's in the same run.
"""

import gc
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import tyro
from timm.optim.lamb import Lamb as TimmLamb
from timm.optim.lars import Lars as TimmLars
from torch import Tensor, nn

from mocov3_ds.distributed import host_memory
from mocov3_ds.distributed.segments import Flat, cut, run_on
from mocov3_ds.model.vit import PAPER_SHAPES, build_vit
from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.optim.kernels import AdamTerms, kernels_for
from mocov3_ds.optim.lamb import trust_ratio
from mocov3_ds.optim.rules import vit_rule
from mocov3_ds.optim.step_tables import NORMS, UPDATE, WEIGHT, plan_of

YARDSTICK = "timm Lamb"
DECAY = 0.1
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of one optimizer step, side by side."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_b16",)
    """backbones of the paper whose tensors are updated"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 5
    """turns of each optimizer"""
    steps: int = 3
    """timed steps of a turn"""


Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """An optimizer of the table.

    Attributes:
        name: as the table shows it.
        build: tensors by name, each with its gradient -> a function that takes one step.
        bytes_each: what its algorithm must move per parameter.
    """

    name: str
    build: Callable[[dict[str, nn.Parameter]], Step]
    bytes_each: int


def main(options: Options) -> None:
    """Print the tables."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use.")
    if min(options.rounds, options.steps, options.threads) < 1:
        raise ValueError("--rounds, --steps and --threads must be at least 1.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    copy = copy_bandwidth(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} thread"
    print(f"{where}{'s' * (device.type == 'cpu' and options.threads > 1)}, ", end="")
    print(f"torch {torch.__version__}, timm {timm.__version__}; a copy moves {copy:.1f} GB/s;")
    print(f"median of {options.rounds} rounds of {options.steps} steps\n")
    for shape in options.shapes:
        table(shape, options, device, copy)


def table(shape: str, options: Options, device: torch.device, copy: float) -> None:
    """Print one size's table."""
    shapes = shapes_of(shape)
    count = sum(math.prod(s) for s in shapes.values())
    print(f"{shape}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters\n")
    need, room = count * 4 * 5, free_bytes(device)
    if need > room:
        print(f"left out: needs {need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free\n")
        return
    runs, absent = here(device)
    times: dict[str, list[float]] = {one.name: [] for one in runs}
    for _ in range(options.rounds):
        for one in runs:
            times[one.name] += turn(one, shapes, options.steps, device)
    unit = "CPU ms" if device.type == "cpu" else "ms"
    print(f"| optimizer | {unit} a step | speed against {YARDSTICK} | GB/s | of copy |")
    print("|---|---|---|---|---|")
    yardstick = statistics.median(times[YARDSTICK])
    for one in runs:
        seconds = statistics.median(times[one.name])
        speed = count * one.bytes_each / seconds / 1e9
        ratio = yardstick / seconds
        print(
            f"| {one.name} | {1e3 * seconds:.1f} | {ratio:.2f} | {speed:.1f} | {speed / copy:.2f} |"
        )
    for name, reason in absent.items():
        print(f"| {name} | {reason} | | | |")
    print(flush=True)


def shapes_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each trained tensor of a backbone."""
    with torch.device("meta"):
        backbone = build_vit(PAPER_SHAPES[shape])
    return {n: tuple(p.shape) for n, p in backbone.named_parameters() if p.requires_grad}


def free_bytes(device: torch.device) -> int:
    """Memory that can be used."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.free_bytes()


def turn(
    one: Contender, shapes: dict[str, tuple[int, ...]], steps: int, device: torch.device
) -> list[float]:
    """Seconds of each timed step."""
    noise = torch.randn(2**20, device=device)
    tensors = {name: nn.Parameter(0.02 * filled(noise, shape)) for name, shape in shapes.items()}
    for tensor in tensors.values():
        tensor.grad = filled(noise, tuple(tensor.shape))
    step = one.build(tensors)
    step()
    times = [timed(step, device) for _ in range(steps)]
    del step, tensors
    gc.collect()
    return times


def filled(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of repeated noise: drawing fresh numbers would take longer than the steps."""
    count = math.prod(shape)
    return noise.repeat(-(-count // len(noise)))[:count].clone().view(shape)


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of copying 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)
    timed(lambda: target.copy_(source), device)
    seconds = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * source.numel() * 4 / seconds / 1e9


def groups(tensors: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices decay (and so adapt, in timm), the rest does not."""
    rules = {name: vit_rule(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return [
        {
            "params": [t for name, t in tensors.items() if bool(rules[name].decay) == decay],
            "weight_decay": DECAY * decay,
        }
        for decay in (True, False)
    ]


def our(kind: Any, **options: Any) -> Callable[[dict[str, nn.Parameter]], Step]:
    """One of ours on whole tensors, as at ZeRO stage 0."""

    def build(tensors: dict[str, nn.Parameter]) -> Step:
        optimizer = kind(tensors.items(), lr=RATE, weight_decay=DECAY, **options)
        optimizer.attach()
        step: Step = optimizer.step
        return step

    return build


def our_flat_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """Our LAMB's two passes over one flat tensor, as at ZeRO stages 1 to 3 on one rank."""
    names, shapes = tuple(tensors), tuple(tuple(t.shape) for t in tensors.values())
    offsets, count = run_on(shapes), sum(t.numel() for t in tensors.values())
    w = torch.cat([t.detach().view(-1) for t in tensors.values()])
    g = torch.cat([t.grad.view(-1) for t in tensors.values() if t.grad is not None])
    for tensor in tensors.values():  # the memory of one copy is enough
        tensor.data, tensor.grad = w[:0], None
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    flat = Flat(w, names, shapes, cut(names, shapes, offsets, 0, count))
    rules = {name: vit_rule(name, shape) for name, shape in zip(names, shapes, strict=True)}
    plan = plan_of([flat], rules)
    (share,) = plan.shares
    kernels = kernels_for("auto", w.device)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        terms = AdamTerms(0.9, 0.999, True, 1e-6, DECAY, done, True)
        sums_3S = torch.zeros(NORMS, len(names), device=w.device)
        kernels.adam(share, w, g, m, v, terms, sums_3S, None)
        norms_3S = sums_3S.sqrt()
        ratio_S = trust_ratio(norms_3S[WEIGHT], norms_3S[UPDATE], plan.adapt_S, None)
        kernels.move(share, w, g, RATE * plan.multiplier_S * ratio_S)

    return step


def their(kind: Any, **options: Any) -> Callable[[dict[str, nn.Parameter]], Step]:
    """An optimizer with torch's interface."""

    def build(tensors: dict[str, nn.Parameter]) -> Step:
        step: Step = kind(groups(tensors), lr=RATE, **options).step
        return step

    return build


def imported(module: str, name: str) -> Any:
    """An optional optimizer's class."""
    return getattr(importlib.import_module(module), name)


def fused_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """DeepSpeed's own kernel (another algorithm: bias correction after a clamped trust ratio)."""
    return their(imported("deepspeed.ops.lamb", "FusedLamb"))(tensors)


def apex_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """NVIDIA apex's."""
    return their(imported("apex.optimizers", "FusedLAMB"), max_grad_norm=0.0)(tensors)


CONTENDERS = (
    Contender("our Lamb", our(Lamb), 40),
    Contender("our Lamb, one flat as under ZeRO", our_flat_lamb, 40),
    Contender("our Lamb, plain path", our(Lamb, backend="plain"), 40),
    Contender(YARDSTICK, their(TimmLamb, max_grad_norm=None, foreach=False), 40),
    Contender(f"{YARDSTICK}, foreach", their(TimmLamb, max_grad_norm=None, foreach=True), 40),
    Contender("DeepSpeed FusedLamb", fused_lamb, 40),
    Contender("apex FusedLAMB", apex_lamb, 40),
    Contender("our Lars", our(Lars), 28),
    Contender("timm Lars", their(TimmLars), 28),
    Contender("our AdamW", our(AdamW), 28),
    Contender("torch AdamW, foreach", their(torch.optim.AdamW, foreach=True), 28),
    Contender("torch AdamW, fused", their(torch.optim.AdamW, fused=True), 28),
)


def here(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """The optimizers that take a step on this machine; why each of the others does not."""
    runs, absent = [], {}
    for one in CONTENDERS:
        try:
            turn(one, {"w.weight": (4, 8), "w.bias": (4,)}, 1, device)
            runs.append(one)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if one.name.startswith("our "):
                raise
            reason = str(error).strip().splitlines()[0][:60]
            absent[one.name] = f"does not run here: {reason}"
    return runs, absent


def command() -> None:
    """Entry of `python -m mocov3_ds.bench optimizer`."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    main(tyro.cli(Options, prog="python -m mocov3_ds.bench optimizer"))
