"""The momentum encoder's move, beside a loop over its tensors and beside a copy of the same bytes.

    python -m mocov3_ds.bench momentum                        ViT-S and ViT-B, one CPU thread
    python -m mocov3_ds.bench momentum --shapes vit_l16 vit_h14 --device cuda

Timed is what a step adds for the momentum encoder apart from its forward pass: fp32 master moved
towards the base weights, low-precision copy refreshed. The loop is how scripts write it,
`k.mul_(m).add_(q, alpha=1 - m)`, on weights of the network's dtype. In bf16 that loop is faster and
wrong, so both ways' errors after `--drift` further moves stand beside the times: distance to the
same moves in fp64, over the length of the way they went.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES

MOMENTUM = 0.99
DRIFT = 1e-3  # of a weight's own size in a step, about what AdamW does at the peak of the recipes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of one move of the momentum encoder."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_s16", "vit_b16")
    """networks of the paper, with their projector"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 5
    """turns of each way; the median counts"""
    steps: int = 20
    """moves in a turn"""
    drift: int = 300
    """moves over which the error builds up"""


def main(options: Options) -> None:
    """Print the table."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"median of {options.rounds} rounds of {options.steps} moves, ", end="")
    print(f"{options.threads} thread(s), torch {torch.__version__}\n")
    print("| network | dtype | M weights | ours, ms | loop, ms | copy, ms | ours / copy ", end="")
    print("| error of ours | of the loop |\n|---|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            row(shape, dtype, device, options)


def row(shape: str, dtype: torch.dtype, device: torch.device, options: Options) -> None:
    """Time and error of one network."""
    torch.manual_seed(0)
    base = BaseEncoder(EncoderShape(vit=PAPER_SHAPES[shape])).to(device)
    encoder = MomentumEncoder(EncoderShape(vit=PAPER_SHAPES[shape]), device=device, dtype=dtype)
    encoder.start_from(dict(base.state_dict()))
    base.to(dtype)
    encoder.follow(base)
    moved = {n: p.data for n, p in base.named_parameters() if p.requires_grad}
    moved = {n: moved[n] for n, _ in encoder.named_parameters() if n in moved}
    loop_keys = {n: q.clone() for n, q in moved.items()}
    masters = dict(encoder.full_state())
    copies = [(masters[n], torch.empty_like(masters[n])) for n in moved]

    def ours() -> None:
        encoder.begin(MOMENTUM)
        encoder.finish()

    def loop() -> None:
        for name, k in loop_keys.items():
            k.mul_(MOMENTUM).add_(moved[name], alpha=1 - MOMENTUM)

    def copy() -> None:
        for source, target in copies:
            target.copy_(source)

    times: dict[str, list[float]] = {"ours": [], "loop": [], "copy": []}
    for _ in range(options.rounds):
        for way, work in (("ours", ours), ("loop", loop), ("copy", copy)):
            times[way].append(milliseconds(work, options.steps, device))
    ms = {way: statistics.median(values) for way, values in times.items()}
    numbers = sum(q.numel() for q in moved.values())
    wrong = errors(moved, masters, loop_keys, ours, loop, options.drift)
    print(
        f"| {shape} | {str(dtype).removeprefix('torch.')} | {numbers / 1e6:.1f} "
        f"| {ms['ours']:.2f} | {ms['loop']:.2f} | {ms['copy']:.2f} "
        f"| {ms['ours'] / ms['copy']:.2f} | {wrong[0]:.1e} | {wrong[1]:.1e} |",
        flush=True,
    )


def milliseconds(work: Callable[[], None], steps: int, device: torch.device) -> float:
    """Of one call: CPU time of all threads on the CPU, time between synchronisations on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    for _ in range(steps):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - started) / steps


@torch.no_grad()
def errors(
    moved: dict[str, Tensor],
    masters: dict[str, Tensor],
    loop_keys: dict[str, Tensor],
    ours: Callable[[], None],
    loop: Callable[[], None],
    steps: int,
) -> tuple[float, float]:
    """Distance of both ways from the moves in fp64, over the length of the way, on one block.

    The weights drift in one direction while the ways follow, as they do between an optimizer's
    steps; fp64 follows the very weights that the two see.
    """
    names = [name for name in moved if ".blocks.0." in name]
    start = {name: masters[name].double() for name in names}
    exact = {name: value.clone() for name, value in start.items()}
    exact_loop = {name: loop_keys[name].double() for name in names}
    start_loop = {name: value.clone() for name, value in exact_loop.items()}
    generator = torch.Generator().manual_seed(0)
    drift = {
        name: (DRIFT * moved[name].float().cpu().abs().mean())
        * torch.randn(moved[name].shape, generator=generator)
        for name in names
    }
    fp32 = {name: moved[name].float() for name in names}
    for _ in range(steps):
        for name in names:
            fp32[name] += drift[name].to(fp32[name].device)
            moved[name].copy_(fp32[name])
        ours()
        loop()
        for name in names:
            exact[name].lerp_(moved[name].double(), 1 - MOMENTUM)
            exact_loop[name].lerp_(moved[name].double(), 1 - MOMENTUM)
    return (
        _relative(names, masters, exact, start),
        _relative(names, loop_keys, exact_loop, start_loop),
    )


def _relative(
    names: list[str], found: dict[str, Tensor], exact: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    off = sum(float((found[n].double() - exact[n]).square().sum()) for n in names)
    way = sum(float((exact[n] - start[n]).square().sum()) for n in names)
    return float((off / way) ** 0.5)


def command() -> Any:
    """Entry of `python -m mocov3_ds.bench momentum`."""
    return main(tyro.cli(Options, prog="python -m mocov3_ds.bench momentum"))
