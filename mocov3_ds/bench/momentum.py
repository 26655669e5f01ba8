"""The momentum encoder's move, beside a loop over its tensors and beside a copy of the same bytes.

    python -m mocov3_ds.bench momentum                        ViT-S and ViT-B, one CPU thread
    python -m mocov3_ds.bench momentum --shapes vit_l16 vit_h14 --device cuda

Timed is what a step adds for the momentum encoder apart from its forward pass: the fp32 master is
moved towards the base weights, and the low-precision copy is refreshed. The loop is how scripts
write it, `k.mul_(m).add_(q, alpha=1 - m)`, on weights of the network's dtype. In bf16 that loop is
faster and wrong, so the errors of both after `--drift` further moves stand beside the times: the
distance to the same moves in fp64, relative to the distance that the weights moved.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mocov3_ds.bench.resource_use import time_call
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape

MOMENTUM = 0.99
DRIFT = 1e-3  # of a weight's own size in a step, about what AdamW does at the peak of the recipes

NamedTensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MomentumOptions:
    """Time of one move of the momentum encoder."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_s16", "vit_b16")
    """networks of the paper, with their projector"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device that holds the weights"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 5
    """turns of each way; the median counts"""
    steps: int = 20
    """moves in a turn"""
    drift: int = 300
    """moves over which the error builds up"""


def run_bench(options: MomentumOptions) -> None:
    """Print the table."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use.")
    torch.set_num_threads(options.threads)
    print(f"median of {options.rounds} rounds of {options.steps} moves, ", end="")
    print(f"{options.threads} thread(s), torch {torch.__version__}\n")
    print("| network | dtype | M weights | ours, ms | loop, ms | copy, ms | ours / copy ", end="")
    print("| error of ours | of the loop |\n|---|---|---|---|---|---|---|---|---|")
    for name in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            print_row(name, PAPER_SHAPES[name], dtype, options)


def print_row(name: str, vit: VitShape, dtype: torch.dtype, options: MomentumOptions) -> None:
    """Print times and errors of one network in one dtype."""
    device = torch.device(options.device)
    moves = Moves(EncoderShape(backbone=vit), device, dtype)
    ways = {"ours": moves.move_encoder, "loop": moves.move_by_loop, "copy": moves.copy_masters}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, work in ways.items():
            times[way].append(milliseconds_per_call(work, options.steps, device))
    ms = {way: statistics.median(values) for way, values in times.items()}
    numbers = sum(weight.numel() for weight in moves.weights.values())
    error, loop_error = measure_errors(moves, options.drift)
    print(
        f"| {name} | {str(dtype).removeprefix('torch.')} | {numbers / 1e6:.1f} "
        f"| {ms['ours']:.2f} | {ms['loop']:.2f} | {ms['copy']:.2f} "
        f"| {ms['ours'] / ms['copy']:.2f} | {error:.1e} | {loop_error:.1e} |",
        flush=True,
    )


class Moves:
    """A base encoder that is followed in three ways: by ours, by a loop, and by a mere copy.

    Args:
        shape: architecture of the encoders.
        device: device that holds the weights.
        dtype: dtype of the base encoder, and so of the loop.
    """

    def __init__(self, shape: EncoderShape, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        base = BaseEncoder(shape).to(device)
        self._encoder = MomentumEncoder(shape, device=device, dtype=dtype)
        self._encoder.start_from(dict(base.state_dict()))
        base.to(dtype)
        self._encoder.follow(base)
        trained = {n: p.data for n, p in base.named_parameters() if p.requires_grad}
        self.weights = {n: trained[n] for n, _ in self._encoder.named_parameters() if n in trained}
        """weights of the base encoder that are followed"""
        self.loop_keys = {n: weight.clone() for n, weight in self.weights.items()}
        self.masters = dict(self._encoder.full_state())
        self._copies = [(self.masters[n], torch.empty_like(self.masters[n])) for n in self.weights]

    def move_encoder(self) -> None:
        """One move as a training step makes it."""
        self._encoder.begin_move(MOMENTUM)
        self._encoder.finish_move()

    def move_by_loop(self) -> None:
        """One move as scripts write it."""
        for name, key in self.loop_keys.items():
            key.mul_(MOMENTUM).add_(self.weights[name], alpha=1 - MOMENTUM)

    def copy_masters(self) -> None:
        """Copy the bytes of the masters."""
        for source, target in self._copies:
            target.copy_(source)


def milliseconds_per_call(work: Callable[[], None], calls: int, device: torch.device) -> float:
    """Milliseconds of one of many calls: CPU time of all threads, or wall time on a GPU."""

    def repeat() -> None:
        for _ in range(calls):
            work()

    work()
    return 1e3 * time_call(repeat, device) / calls


@torch.no_grad()
def measure_errors(moves: Moves, steps: int) -> tuple[float, float]:
    """Relative errors of our moves and of the loop's, against fp64, on the first block.

    The weights drift in one direction while they are followed, as they do between an optimizer's
    steps; fp64 follows the same rounded weights.
    """
    names = [name for name in moves.weights if ".blocks.0." in name]
    start = {name: moves.masters[name].double() for name in names}
    loop_start = {name: moves.loop_keys[name].double() for name in names}
    exact = {name: value.clone() for name, value in start.items()}
    loop_exact = {name: value.clone() for name, value in loop_start.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: moves.weights[name].float() for name in names}
    drift = {
        name: DRIFT * weight.cpu().abs().mean() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    for _ in range(steps):
        for name, weight in weights.items():
            weight += drift[name].to(weight.device)
            moves.weights[name].copy_(weight)
        moves.move_encoder()
        moves.move_by_loop()
        for name in names:
            exact[name].lerp_(moves.weights[name].double(), 1 - MOMENTUM)
            loop_exact[name].lerp_(moves.weights[name].double(), 1 - MOMENTUM)
    return (
        _relative_error(moves.masters, exact, start),
        _relative_error(moves.loop_keys, loop_exact, loop_start),
    )


def _relative_error(tensors: NamedTensors, exact: NamedTensors, start: NamedTensors) -> float:
    """Distance from `exact` relative to the distance from `start` to `exact`."""
    error = sum(float((tensors[n].double() - exact[n]).square().sum()) for n in exact)
    distance = sum(float((exact[n] - start[n]).square().sum()) for n in exact)
    return float((error / distance) ** 0.5)
