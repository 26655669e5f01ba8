"""What does measuring every layer group at every step cost, beside steps without it?

    python -m mocov3_ds.bench signals                      optimizers at ViT-S, and the tiny recipe
    python -m mocov3_ds.bench signals --shapes vit_b16     the optimizers at another size
    python -m mocov3_ds.bench signals --shapes --blocks 0  the parts and the instruments alone

The optimizer alone: one step on the tensors of a backbone, with the norms alone and with all
signals, taking turns. The whole step of a run on drawn images: data, views, forward, backward and
optimizer; with the signals also their row, the spread of the features every 10 steps and the
attention every 50. Blocks of steps with and without signals take turns in one run. Times are CPU
seconds of the process; medians count. On a busy machine the noise of whole steps is larger than the
difference, so the parts that each step needs are also timed alone.

The instruments: steps of one run, each with one instrument, in turn. What a look takes beside the
step is timed alone, and so is what the optimizer does for the layers; whole steps vary by more.
"""

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from mocov3_ds.bench.optimizer import backbone_shapes, fill_with_noise
from mocov3_ds.bench.resource_use import time_call
from mocov3_ds.config.parts import SignalConfig
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.layer_groups import group_names, layer_group
from mocov3_ds.monitoring.alarms import Alarms
from mocov3_ds.monitoring.signal_file import GroupExtremes, SignalFile
from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.recipes import RECIPES, parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from mocov3_ds.training.run import Run

_CPU = torch.device("cpu")

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdamW, update_clip": (AdamW, {"update_clip": True}),
    "Lamb": (Lamb, {}),
    "Lars": (Lars, {}),
}


@dataclass(frozen=True, kw_only=True)
class SignalOptions:
    """Cost of the signals, side by side."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_s16",)
    """backbones of the paper whose tensors the optimizers update"""
    rounds: int = 9
    """turns of each optimizer"""
    blocks: int = 6
    """blocks of steps of the whole run, half of them without signals; 0 = no whole run"""
    steps: int = 10
    """steps of a block"""
    turns: int = 5
    """steps with each instrument, of a run of the tiny recipe, 2 or more; 0 = none"""


_NEVER = 10**9
_SILENT = SignalConfig(every=0, features_every=0, attention_every=0)
LAYERS = "gradients, updates, g / sqrt(v) of all layers"
INSTRUMENTS: dict[str, tuple[str, SignalConfig]] = {
    LAYERS: ("every", replace(_SILENT, every=1)),
    "spread of queries and keys": (
        "features_every",
        replace(_SILENT, every=_NEVER, features_every=1),
    ),
    "attention per head, activations of blocks": (
        "attention_every",
        replace(_SILENT, every=_NEVER, attention_every=1),
    ),
    "gradient noise scale": ("noise_every", replace(_SILENT, noise_every=1)),
    "sharpness and curvature": ("sharpness_every", replace(_SILENT, sharpness_every=1)),
}
"""instrument -> its flag, and the settings with which it alone looks at each step"""
_SMALL = 0.01
"""share of a run's time that a look may cost without a thought"""


class Times(NamedTuple):
    """Seconds of steps without and with the signals, taken in turns."""

    without: list[float]
    with_signals: list[float]


def run_bench(options: SignalOptions) -> None:
    """Print the table."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if min(options.rounds, options.steps) < 1 or options.blocks < 0:
        raise ValueError("--rounds and --steps must be at least 1, --blocks at least 0.")
    if options.turns < 0 or options.turns == 1:
        raise ValueError("--turns must be 0, or at least 2.")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, CPU milliseconds\n")
    print("| step | without | with signals | ratio | added |")
    print("|---|---|---|---|---|")
    for shape in options.shapes:
        for kind in KINDS:
            times = time_optimizer(backbone_shapes(shape), kind, options.rounds)
            print_row(f"{kind}, {shape}", times)
    print_row("tiny recipe: optimizer, row, alarms", time_parts(5 * options.rounds))
    if options.blocks:
        times = time_whole_steps(["--recipe", "tiny"], options.blocks, options.steps)
        print_row(f"whole step, tiny recipe, {len(times.with_signals)} steps", times)
    if options.turns:
        print_instruments(*time_instruments(["--recipe", "tiny"], options.turns))


def print_instruments(steps: Sequence[float], looks: Mapping[str, Sequence[float]]) -> None:
    """Print what one look costs, what it costs as a run makes it, and how often costs little.

    Args:
        steps: CPU seconds of steps without what is looked at beside them.
        looks: instrument of `INSTRUMENTS` -> CPU seconds of its looks.
    """
    step = statistics.median(steps)
    print(
        f"\none look beside a step of {1e3 * step:.0f} ms ({1e3 * min(steps):.0f} to "
        f"{1e3 * max(steps):.0f}), medians of {min(map(len, looks.values()))} and more\n"
    )
    print("| instrument | flag | ms a look | in steps | default | costs a run | 1 % from every |")
    print("|---|---|---|---|---|---|---|")
    for name, (flag, _) in INSTRUMENTS.items():
        look = statistics.median(looks[name])
        default = getattr(SignalConfig(), flag)
        cost = f"{100 * look / step / default:.1f} %" if default else "-"
        print(
            f"| {name} | `--signals.{flag}` | {1e3 * look:.1f} | {look / step:.3f} "
            f"| {default or 'off'} | {cost} | {max(math.ceil(look / step / _SMALL), 1)} |"
        )


def print_row(name: str, times: Times) -> None:
    """Print the medians, their ratio and their difference in milliseconds."""
    without, with_signals = map(statistics.median, times)
    added = 1e3 * (with_signals - without)
    print(
        f"| {name} | {1e3 * without:.1f} | {1e3 * with_signals:.1f} "
        f"| {with_signals / without:.3f} | {added:+.1f} |"
    )


def time_optimizer(shapes: dict[str, tuple[int, ...]], kind: str, rounds: int) -> Times:
    """Time the steps of an optimizer of `KINDS` on tensors of these shapes."""
    noise = torch.randn(2**20)
    make, arguments = KINDS[kind]
    tensors = {n: nn.Parameter(0.02 * fill_with_noise(noise, s)) for n, s in shapes.items()}
    optimizer = make(tensors.items(), lr=1e-4, weight_decay=0.1, **arguments)
    optimizer.attach()
    times = Times([], [])
    for turn in range(rounds + 1):
        for measures, seconds in zip((False, True), times, strict=True):
            for tensor in tensors.values():  # a step uses the gradients as scratch space
                tensor.grad = fill_with_noise(noise, tuple(tensor.shape))
            optimizer.measure_all(measures)
            elapsed = time_call(optimizer.step, _CPU)
            if turn:  # the first allocates
                seconds.append(elapsed)
    return times


def time_parts(rounds: int) -> Times:
    """Time the tiny recipe's optimizer step, and one with its row of signals and its alarms."""
    config = RECIPES["tiny"].config
    base = BaseEncoder(EncoderShape(backbone=config.vit, hidden=config.model.hidden))
    trained = [(name, p) for name, p in base.named_parameters() if p.requires_grad]
    optimizer, groups = AdamW(trained), group_names(config.model.depth)
    optimizer.attach()
    extremes = GroupExtremes(groups, [layer_group(name) for name, _ in trained])
    alarms, times = Alarms(), Times([], [])
    with tempfile.TemporaryDirectory() as folder:
        file = SignalFile(Path(folder), groups, steps_done=0)

        def step() -> None:
            optimizer.step()
            signals = optimizer.signals()
            if signals is not None and signals.complete:
                values = extremes.reduce_tensors(signals.table())
                file.write_row({"step": 1, **values})
                alarms.push(values["block_0/rms"], values["block_0/grad_linf"])

        for _ in range(rounds):
            for measures, seconds in zip((False, True), times, strict=True):
                for _, parameter in trained:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.measure_all(measures)
                seconds.append(time_call(step, _CPU))
        file.close()
    return times


def time_whole_steps(flags: list[str], blocks: int, steps: int) -> Times:
    """Time the steps of a run, in blocks without and with signals that take turns.

    Args:
        flags: flags of train.py that say which run.
        blocks: number of blocks that count, half of them with signals.
        steps: number of steps in a block.
    """
    times = Times([], [])
    with started_run(flags) as run:
        with_signals = run.config
        without = replace(with_signals, signals=replace(with_signals.signals, every=0))
        for block in range(-1, blocks):  # one more, to warm up
            measures = block % 2 == 1
            run.recorder.config = with_signals if measures else without
            for _ in range(steps):
                elapsed = sum(record_step(run))
                if block >= 0:
                    times[measures].append(elapsed)
    return times


def time_instruments(flags: list[str], turns: int) -> tuple[list[float], dict[str, list[float]]]:
    """Time looks of each of `INSTRUMENTS` alone, in steps of one run, in turn.

    Args:
        flags: flags of train.py that say which run.
        turns: number of steps with each that count; the first one beside them does not.

    Returns:
        CPU seconds of the steps without the looks, and instrument -> those of its looks.
    """
    steps: list[float] = []
    looks: dict[str, list[float]] = {name: [] for name in INSTRUMENTS}
    due = ["--signals.sharpness_every", "1", "--signals.noise_every", "1"]
    with started_run([*flags, *due]) as run:
        config = run.config
        for turn in range(turns + 1):
            for name, (_, signals) in INSTRUMENTS.items():
                run.recorder.config = replace(config, signals=signals)
                run.instruments.signals = signals
                step_s, look_s = record_step(run)
                if turn:  # the first allocates, and sharpness begins at random numbers
                    steps.append(step_s)
                    looks[name].append(look_s)
    parts = time_parts(5 * turns)  # most of it lies within the optimizer's step
    looks[LAYERS] = [b - a for a, b in zip(*parts, strict=True)]
    return steps, looks


@contextlib.contextmanager
def started_run(flags: list[str]) -> Iterator[Run]:
    """A run without k-NN monitor in a folder of its own, which is closed and removed again."""
    with tempfile.TemporaryDirectory() as folder:
        run_flags = [*flags, "--runs", folder, "--knn.probes", "0", "--data.threads", "0"]
        with contextlib.closing(build_run(parse(run_flags), ranks.start())) as run:
            yield run


def record_step(run: Run) -> tuple[float, float]:
    """A step, and what is looked at; CPU seconds of both."""
    started = time.process_time()
    advanced = advance_run(run)
    stepped = time.process_time()
    run.recorder.record(
        run.step,
        {"step": run.step, **advanced.measured_values()},
        sample_ids_B=advanced.batch.sample_ids_B,
        x1_BCHW=advanced.x1_BCHW,
        pair=advanced.result.pair,
        backbone=run.base.backbone,
    )
    recorded = time.process_time()
    return stepped - started - advanced.look_cpu_s, recorded - stepped + advanced.look_cpu_s
