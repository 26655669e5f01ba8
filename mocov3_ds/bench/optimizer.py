"""One optimizer step on the tensors of a ViT: ours beside timm's, torch's, DeepSpeed's and apex's.

    python -m mocov3_ds.bench optimizer                                  ViT-B, one CPU thread
    python -m mocov3_ds.bench optimizer --shapes vit_b16 vit_l16 vit_h14 the sizes of the paper
    python -m mocov3_ds.bench optimizer --device cuda                    a GPU, with its bandwidth
    python -m mocov3_ds.bench optimizer --kind muon --shapes vit_s16 --blocks 1   Muon alone

Each optimizer updates all trained tensors of the ViT's backbone, unsharded, from the same weights
and gradients. They take turns for several rounds. Each turn builds the state from scratch, so that
only one optimizer's memory is in use, takes one step to warm up, and then the timed steps; the
median counts. Time is CPU seconds on the CPU and seconds between synchronisations on a GPU. GB/s
are the bytes that the algorithm must move (see `optim/kernels.py`) over the time, and "of
copy" compares them with those of a plain copy in the same run. Of Muon the operations of its
products are told beside those that a product of a square matrix reaches.
"""

import gc
import importlib
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from timm.optim.lamb import Lamb as TimmLamb
from timm.optim.lars import Lars as TimmLars
from torch import Tensor, nn

from mocov3_ds.bench.resource_use import time_call
from mocov3_ds.distributed import host_memory
from mocov3_ds.distributed.segments import Flat, cut_segments, packed_offsets
from mocov3_ds.model.vit import PAPER_SHAPES, build_vit
from mocov3_ds.optim import AdamW, Lamb, Lars, Muon
from mocov3_ds.optim.kernel_types import NORMS, FlatStep
from mocov3_ds.optim.kernels import choose_kernels
from mocov3_ds.optim.lamb import trust_ratio
from mocov3_ds.optim.orthogonal import count_operations
from mocov3_ds.optim.rules import vit_rule
from mocov3_ds.optim.step_tables import build_tables
from mocov3_ds.settings.wording import count_noun

YARDSTICK = "timm Lamb"
DECAY = 0.1
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Time of one optimizer step, side by side."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_b16",)
    """backbones of the paper whose tensors are updated"""
    kind: Literal["elementwise", "muon"] = "elementwise"
    """optimizers that are bound by bytes, or Muon, whose step takes minutes for ViT-B on a CPU"""
    blocks: int = 0
    """blocks of the backbone; 0 = as many as the paper's has"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device that holds the weights"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 5
    """turns of each optimizer"""
    steps: int = 3
    """timed steps of a turn"""


Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """An optimizer of the table."""

    name: str
    """name in the table"""
    build: Callable[[dict[str, nn.Parameter]], Step]
    """makes a function that takes one step, from the tensors by name; each has its gradient"""
    bytes_each: int
    """bytes that its algorithm must move for each parameter"""
    products: torch.dtype | None = None
    """precision of its matrix products; None = it has none"""


def run_bench(options: OptimizerOptions) -> None:
    """Print the tables."""
    if options.blocks < 0:
        raise ValueError(f"--blocks is {options.blocks}; it must be 0 (all of them) or more.")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name in options.shapes:
        title = f"{name}, {count_noun(options.blocks, 'block')}" if options.blocks else name
        compare_optimizers(title, backbone_shapes(name, options.blocks), options)


def compare_optimizers(
    title: str,
    shapes: Mapping[str, tuple[int, ...]],
    options: OptimizerOptions,
    free: int | None = None,
) -> None:
    """Print the table of one set of tensors.

    Args:
        title: name of the set.
        shapes: shape of each tensor by name.
        options: what the user gave on the command line.
        free: free memory in bytes; None = ask the system.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use.")
    if min(options.rounds, options.steps, options.threads) < 1:
        raise ValueError("--rounds, --steps and --threads must be at least 1.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    count = sum(math.prod(shape) for shape in shapes.values())
    copy = copy_bandwidth(device)
    print_heading(f"{title}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters", options, copy)
    needed, free = count * 4 * 5, free_bytes(device) if free is None else free
    if needed > free:
        print(f"left out: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free\n")
        return
    contenders, absent = try_contenders(device, CONTENDERS[options.kind])
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(options.rounds):
        for contender in contenders:
            times[contender.name] += time_turn(contender, shapes, options.steps, device)
    unit = "CPU ms" if device.type == "cpu" else "ms"
    yardstick = YARDSTICKS[options.kind]
    print(f"| optimizer | {unit} a step | speed against {yardstick} | GB/s | of copy |")
    print("|---|---|---|---|---|")
    yardstick_s = statistics.median(times[yardstick])
    for contender in contenders:
        seconds = statistics.median(times[contender.name])
        speed = count * contender.bytes_each / seconds / 1e9
        print(
            f"| {contender.name} | {1e3 * seconds:.1f} | {yardstick_s / seconds:.2f} | {speed:.1f} "
            f"| {speed / copy:.2f} |"
        )
    for name, reason in absent.items():
        print(f"| {name} | {reason} | | | |")
    print()
    for contender in contenders:
        if contender.products is not None:
            seconds = statistics.median(times[contender.name])
            print_operations(contender, muon_operations(shapes) / seconds, device)
    print(flush=True)


def muon_operations(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Operations of Muon's products in a step: the floor, as no way to fewer is taken here."""
    return sum(count_operations(*s, steps=5) for s in shapes.values() if len(s) == 2)


def print_operations(contender: Contender, reached: float, device: torch.device) -> None:
    """Print the operations a second of a contender beside those of one product."""
    assert contender.products is not None
    side = 512 if device.type == "cpu" else 4096
    x = torch.randn(side, side, device=device, dtype=contender.products)
    time_call(lambda: x @ x, device)
    seconds = statistics.median(time_call(lambda: x @ x, device) for _ in range(5))
    product = 2 * side**3 / seconds
    print(
        f"{contender.name}: {reached / 1e9:.1f} Gop/s, {reached / product:.2f} of a product of "
        f"{side} x {side} in {str(contender.products).removeprefix('torch.')}"
    )


def print_heading(title: str, options: OptimizerOptions, copy: float) -> None:
    """Print the lines above the table."""
    on_cpu = options.device == "cpu"
    threads = count_noun(options.threads, "thread")
    print(f"{threads if on_cpu else torch.cuda.get_device_name()}, ", end="")
    print(f"torch {torch.__version__}, timm {timm.__version__}; a copy moves {copy:.1f} GB/s;")
    print(f"median of {options.rounds} rounds of {options.steps} steps\n\n{title}\n")


def backbone_shapes(name: str, blocks: int = 0) -> dict[str, tuple[int, ...]]:
    """Name and shape of each trained tensor of one of the paper's backbones.

    Args:
        name: Name of the backbone.
        blocks: Number of its blocks; 0 = all of them.
    """
    shape = PAPER_SHAPES[name]
    with torch.device("meta"):
        backbone = build_vit(replace(shape, depth=blocks or shape.depth))
    return {n: tuple(p.shape) for n, p in backbone.named_parameters() if p.requires_grad}


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that a process can still use on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.free_bytes()


def time_turn(
    contender: Contender, shapes: Mapping[str, tuple[int, ...]], steps: int, device: torch.device
) -> list[float]:
    """Seconds of each timed step of an optimizer that starts from scratch."""
    noise = torch.randn(2**20, device=device)
    tensors = {
        name: nn.Parameter(0.02 * fill_with_noise(noise, shape)) for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        tensor.grad = fill_with_noise(noise, tuple(tensor.shape))
    step = contender.build(tensors)
    step()
    times = [time_call(step, device) for _ in range(steps)]
    del step, tensors
    gc.collect()
    return times


def fill_with_noise(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of repeated noise: drawing new numbers would take longer than the steps."""
    count = math.prod(shape)
    return noise.repeat(-(-count // len(noise)))[:count].clone().view(shape)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of copying 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)
    time_call(lambda: target.copy_(source), device)
    seconds = statistics.median(time_call(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * source.numel() * 4 / seconds / 1e9


def decay_groups(tensors: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for torch: matrices decay (and so adapt, in timm), the rest does not."""
    rules = {name: vit_rule(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return [
        {
            "params": [t for name, t in tensors.items() if bool(rules[name].decay) == decay],
            "weight_decay": DECAY * decay,
        }
        for decay in (True, False)
    ]


def build_ours(kind: Any, **options: Any) -> Callable[[dict[str, nn.Parameter]], Step]:
    """Builder of one of our optimizers on whole tensors, as at ZeRO stage 0."""

    def build(tensors: dict[str, nn.Parameter]) -> Step:
        optimizer = kind(tensors.items(), lr=RATE, weight_decay=DECAY, **options)
        optimizer.attach()
        return optimizer.step

    return build


def build_flat_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """Our LAMB's two passes over one flat tensor, as at ZeRO stages 1 to 3 on one rank."""
    names, shapes = tuple(tensors), tuple(tuple(t.shape) for t in tensors.values())
    offsets, count = packed_offsets(shapes), sum(t.numel() for t in tensors.values())
    w = torch.cat([t.detach().view(-1) for t in tensors.values()])
    g = torch.cat([t.grad.view(-1) for t in tensors.values() if t.grad is not None])
    for tensor in tensors.values():  # the memory of one copy is enough
        tensor.data, tensor.grad = w[:0], None
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    flat = Flat(w, names, shapes, cut_segments(names, shapes, offsets, 0, count))
    rules = {name: vit_rule(name, shape) for name, shape in zip(names, shapes, strict=True)}
    tables = build_tables([flat], rules)
    (share,) = tables.shares
    kernels = choose_kernels("auto", w.device)
    group = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": DECAY, "bias_correction": True}
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        flat_step = FlatStep(share, kernels, w, g, (m, v), group, steps)
        sums_3S = torch.zeros(NORMS, len(names), device=w.device)
        kernels.update_adam(flat_step, sums_3S, None)
        weight_S, update_S, _ = sums_3S.sqrt()
        ratio_S = trust_ratio(weight_S, update_S, tables.adapt_S, None)
        kernels.move_weights(flat_step, RATE * tables.multiplier_S * ratio_S)

    return step


def build_theirs(kind: Any, **options: Any) -> Callable[[dict[str, nn.Parameter]], Step]:
    """Builder of an optimizer with torch's interface."""

    def build(tensors: dict[str, nn.Parameter]) -> Step:
        return kind(decay_groups(tensors), lr=RATE, **options).step

    return build


def build_torch_muon(tensors: dict[str, nn.Parameter]) -> Step:
    """Torch's Muon for the matrices (its products are bf16 always), its AdamW for the rest."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    other_tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim != 2}
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(decay_groups(other_tensors), lr=RATE, foreach=True)

    def step() -> None:
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()

    return step


def import_class(module: str, name: str) -> Any:
    """Class of an optimizer whose package may be missing."""
    return getattr(importlib.import_module(module), name)


def build_fused_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """DeepSpeed's own kernel (another algorithm: bias correction after a clamped trust ratio)."""
    return build_theirs(import_class("deepspeed.ops.lamb", "FusedLamb"))(tensors)


def build_apex_lamb(tensors: dict[str, nn.Parameter]) -> Step:
    """NVIDIA apex's LAMB."""
    return build_theirs(import_class("apex.optimizers", "FusedLAMB"), max_grad_norm=0.0)(tensors)


_ELEMENTWISE = (
    Contender("our Lamb", build_ours(Lamb), Lamb.bytes_moved()),
    Contender("our Lamb, one flat as under ZeRO", build_flat_lamb, Lamb.bytes_moved()),
    Contender("our Lamb, plain path", build_ours(Lamb, backend="plain"), Lamb.bytes_moved()),
    Contender(YARDSTICK, build_theirs(TimmLamb, max_grad_norm=None, foreach=False), 40),
    Contender(
        f"{YARDSTICK}, foreach", build_theirs(TimmLamb, max_grad_norm=None, foreach=True), 40
    ),
    Contender("DeepSpeed FusedLamb", build_fused_lamb, 40),
    Contender("apex FusedLAMB", build_apex_lamb, 40),
    Contender("our Lars", build_ours(Lars), Lars.bytes_moved()),
    Contender("timm Lars", build_theirs(TimmLars), 28),
    Contender("our AdamW", build_ours(AdamW), AdamW.bytes_moved()),
    Contender("torch AdamW, foreach", build_theirs(torch.optim.AdamW, foreach=True), 28),
    Contender("torch AdamW, fused", build_theirs(torch.optim.AdamW, fused=True), 28),
)
_MUON = (
    Contender("our Muon", build_ours(Muon, last_layer="muon"), Muon.bytes_moved(), torch.float32),
    Contender(
        "our Muon, bf16 products",
        build_ours(Muon, last_layer="muon", ns_dtype="bf16"),
        Muon.bytes_moved(),
        torch.bfloat16,
    ),
    Contender("torch Muon", build_torch_muon, Muon.bytes_moved(), torch.bfloat16),
)
CONTENDERS = {"elementwise": _ELEMENTWISE, "muon": _MUON}
YARDSTICKS = {"elementwise": YARDSTICK, "muon": "torch Muon"}


def try_contenders(
    device: torch.device, contenders: Sequence[Contender]
) -> tuple[list[Contender], dict[str, str]]:
    """The optimizers that can take a step on this machine, and why each of the others cannot."""
    able, absent = [], {}
    for contender in contenders:
        try:
            time_turn(contender, {"w.weight": (4, 8), "w.bias": (4,)}, 1, device)
            able.append(contender)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if contender.name.startswith("our "):
                raise
            reason = str(error).strip().splitlines()[0][:60]
            absent[contender.name] = f"does not run here: {reason}"
    return able, absent
