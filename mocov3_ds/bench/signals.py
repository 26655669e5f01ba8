"""What measuring every layer group at every step costs, beside steps without it.

    python -m mocov3_ds.bench signals                      optimizers at ViT-S, and the tiny recipe
    python -m mocov3_ds.bench signals --shapes vit_b16     the optimizers at another size

The optimizer alone: one step on the tensors of a backbone, with and without `watch`, taking turns.
The whole step of the main job on drawn images: data, views, forward, backward, optimizer, and with
the signals also their row, the spread of the features every 10 steps and the attention every 50;
blocks of steps with and without take turns in one run. CPU seconds of the process; medians. On a
busy machine the noise of whole steps is larger than what is looked for, so the parts that are due
at each step are timed alone as well.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from mocov3_ds.bench.optimizer import filled, shapes_of, timed
from mocov3_ds.config import RECIPES
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.layer_groups import group_names, group_of
from mocov3_ds.monitoring.alarms import Alarms
from mocov3_ds.monitoring.signal_file import ByGroup, SignalFile
from mocov3_ds.optim import AdamW, Lamb, Lars

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdamW, update_clip": (AdamW, {"update_clip": True}),
    "Lamb": (Lamb, {}),
    "Lars": (Lars, {}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cost of the signals, side by side."""

    shapes: tuple[Literal["vit_s16", "vit_b16", "vit_l16", "vit_h14"], ...] = ("vit_s16",)
    """backbones of the paper whose tensors the optimizers update"""
    rounds: int = 9
    """turns of each optimizer"""
    blocks: int = 6
    """blocks of steps of the whole run, half of them without signals; 0 = no whole run"""
    steps: int = 10
    """steps of a block"""


def main(options: Options) -> None:
    """Print the tables."""
    if min(options.rounds, options.steps) < 1 or options.blocks < 0:
        raise ValueError("--rounds and --steps must be at least 1, --blocks at least 0.")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, CPU milliseconds\n")
    print("| step | without | with signals | ratio | added |")
    print("|---|---|---|---|---|")
    for shape in options.shapes:
        for kind in KINDS:
            without, with_ = optimizer_turns(shape, kind, options.rounds)
            say(f"{kind}, {shape}", statistics.median(without), statistics.median(with_))
    without, with_ = parts_of_a_step(5 * options.rounds)
    say("tiny recipe: optimizer, row, alarms", statistics.median(without), statistics.median(with_))
    if options.blocks:
        without, with_ = whole_steps(options.blocks, options.steps)
        name = f"whole step, tiny recipe, {len(with_)} steps"
        say(name, statistics.median(without), statistics.median(with_))


def say(name: str, without: float, with_: float) -> None:
    """One row of the table."""
    added = 1e3 * (with_ - without)
    ratio = with_ / without
    print(f"| {name} | {1e3 * without:.1f} | {1e3 * with_:.1f} | {ratio:.3f} | {added:+.1f} |")


def optimizer_turns(shape: str, kind: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a step without and with watching, in turns on the same state."""
    noise = torch.randn(2**20)
    make, arguments = KINDS[kind]
    tensors = {n: nn.Parameter(0.02 * filled(noise, s)) for n, s in shapes_of(shape).items()}
    optimizer = make(tensors.items(), lr=1e-4, weight_decay=0.1, **arguments)
    optimizer.attach()
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for watch in (False, True):
            for tensor in tensors.values():  # a step uses the gradients as scratch space
                tensor.grad = filled(noise, tuple(tensor.shape))
            optimizer.watch = watch
            seconds = timed(optimizer.step, torch.device("cpu"))
            if turn:  # the first allocates
                times[watch].append(seconds)
    return times[False], times[True]


def parts_of_a_step(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the tiny recipe's optimizer step, and of one with its row and its alarms."""
    config = RECIPES["tiny"].config
    base = BaseEncoder(EncoderShape(vit=config.vit, hidden=config.model.hidden))
    trained = [(name, p) for name, p in base.named_parameters() if p.requires_grad]
    optimizer, groups = AdamW(trained), group_names(config.model.depth)
    optimizer.attach()
    by_group, alarms = ByGroup(groups, [group_of(name) for name, _ in trained]), Alarms()
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        file = SignalFile(Path(folder), groups, steps_done=0)

        def step() -> None:
            optimizer.step()
            if optimizer.watch and (signals := optimizer.signals()) is not None:
                values = by_group(signals.table())
                file.write({"step": 1, **values})
                alarms.push(values["block_0/rms"], values["block_0/grad_linf"])

        for _ in range(rounds):
            for watch in (False, True):
                for _, parameter in trained:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.watch = watch
                times[watch].append(timed(step, torch.device("cpu")))
        file.close()
    return times[False], times[True]


def whole_steps(blocks: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the main job's steps, blocks without and with signals in turns."""
    # imported here: the optimizers above need no engine
    from mocov3_ds.config import parse
    from mocov3_ds.distributed import ranks
    from mocov3_ds.training.advance import advance
    from mocov3_ds.training.run import build_job

    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--runs", folder, "--knn.probes", "0", "--data.threads", "0"]
        job = build_job(parse(flags), ranks.start())
        watching = job.config
        silent = replace(watching, signals=replace(watching.signals, every=0))
        for block in range(-1, blocks):  # one more, to warm up
            on = block % 2 == 1
            job.watch.config = watching if on else silent
            for _ in range(steps):
                begin = time.process_time()
                taken = advance(job)
                row = {"step": job.step, **taken.measured()}
                job.watch.record(job, taken.batch, taken.x1_BCHW, row)
                if block >= 0:
                    times[on].append(time.process_time() - begin)
        job.close()
    return times[False], times[True]


def command() -> None:
    """Entry of `python -m mocov3_ds.bench signals`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(tyro.cli(Options, prog="python -m mocov3_ds.bench signals"))
