"""The speed of a step on cards of today, computed from its counted launches, waits and bytes.

    python -m mocov3_ds.bench predicted

Nothing is run, and no number was measured on a GPU. The network's part of a step takes the longer
of two times: what the planner computes for the card, and what the host needs to launch it; so does
the part of the optimizer and of the momentum encoder. Added are the waits of the host and the wire.
Launches and waits are those that `bench launches` counted on the fake GPU, before and after this
project's changes; where a card needs other chunks than the counted run, launches of forward passes
and of backward passes are multiplied. "Compiled" takes the element-wise kernels of compiled blocks.
"""

from dataclasses import dataclass, replace
from typing import Literal

from mocov3_ds.planning.architecture import count_momentum_weights
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.pace import Pace, plan_pace
from mocov3_ds.planning.reach import COMPILED
from mocov3_ds.planning.step_setup import Passes, StepSetup

_LAUNCH_S = 5e-6
"""seconds of the host for a launch in eager torch: assumed"""
_WAIT_S = 20e-6
"""seconds from a wait of the host to the next kernel at work: assumed"""
_COPY_BANDWIDTH = 25e9
"""bytes a second from the host to a card over PCIe 4: assumed"""


@dataclass(frozen=True, kw_only=True)
class NetworkLaunches:
    """Launches of the network in one counted step on one rank, and how it went through it."""

    queries: int
    keys: int
    backward: int
    """with the forward passes that are repeated in it"""
    rest: int
    """views, loss and all else but the optimizer and the momentum encoder"""
    passes: Passes

    def of(self, passes: Passes) -> float:
        """The same for a step of other passes."""
        a_query, a_key = self.queries / self.passes.forward, self.keys / self.passes.forward
        a_backward = (self.backward - a_query * self.passes.recomputed) / self.passes.forward
        forward, recomputed = passes.forward, passes.recomputed
        return (a_query + a_key + a_backward) * forward + a_query * recomputed + self.rest


NETWORKS = {
    "vit_s16": NetworkLaunches(
        queries=248, keys=526, backward=1102, rest=528, passes=Passes(forward=2, recomputed=0)
    ),
    "vit_l16": NetworkLaunches(
        queries=3904, keys=4184, backward=13986, rest=2970, passes=Passes(forward=16, recomputed=10)
    ),
}
"""counted at 512 images a rank, chunks of 64 in ViT-L, on one rank of an 80 GB card"""


@dataclass(frozen=True, kw_only=True)
class Around:
    """What was counted around the network on 8 ranks at ZeRO-1."""

    optimizer: int
    """launches"""
    momentum: int
    """launches"""
    waits: int
    momentum_bytes: int
    """bytes that the momentum encoder moves for each of its numbers, in bf16"""
    copy_bytes: int
    """bytes of an image's crops that the card waits for"""


_CROP_BYTES = 2 * 3 * 224 * 224
TIMES = {
    "before": Around(
        optimizer=642, momentum=357, waits=31, momentum_bytes=24, copy_bytes=_CROP_BYTES
    ),
    "after": Around(optimizer=32, momentum=1, waits=3, momentum_bytes=12, copy_bytes=0),
}
"""commit a69b7b1, and today"""


@dataclass(frozen=True, kw_only=True)
class PredictedOptions:
    """Speed of a step, computed from counts."""

    shapes: tuple[Literal["vit_s16", "vit_l16"], ...] = ("vit_s16", "vit_l16")
    """recipes"""
    clusters: tuple[str, ...] = ("8xH200", "8xA100-80GB", "8xRTX4090")
    """cards, as mocov3 plan --gpus takes them"""
    batch: int = 4096
    """images of all ranks together"""


def run_bench(options: PredictedOptions) -> None:
    """Print the table."""
    print("| network | cards | chunks | launches | host, ms | step before, ms | after | compiled |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for cards in options.clusters:
            print(f"| {' | '.join(predict_row(shape, cards, options.batch))} |", flush=True)


def predict_row(shape: str, cards: str, batch: int) -> list[str]:
    """Cells of one row: layout, and milliseconds with the share of the peak.

    Args:
        shape: Recipe, one of `NETWORKS`.
        cards: Cluster as the planner reads it, e.g. 8xH200.
        batch: Images of all ranks together.
    """
    cluster = read_cluster(cards)
    option = next(
        option
        for option in rank_options(plan_run(shape, batch=batch), cluster, (1,))
        if not option.setup.recompute_blocks
    )
    setup, card = option.setup, cluster.card
    assert option.pace is not None, f"{shape} fits on {cards}"
    compiled = replace(card, reach=replace(card.reach, elementwise=COMPILED))
    launches = NETWORKS[shape].of(setup.passes)
    cells = [shape, cluster.title, option.passes, f"{launches:.0f}"]
    cells.append(f"{launches * _LAUNCH_S * 1e3:.0f}")
    ways = [(option.pace, TIMES["before"]), (option.pace, TIMES["after"])]
    ways.append((plan_pace(setup, replace(cluster, card=compiled)), TIMES["after"]))
    for pace, around in ways:
        seconds = step_seconds(pace, setup, launches, around, card.bandwidth)
        mfu = pace.operations / seconds / pace.peak_rate
        cells.append(f"{seconds * 1e3:.0f} ({mfu:.1%})")
    return cells


def step_seconds(
    pace: Pace, setup: StepSetup, launches: float, around: Around, bandwidth: float
) -> float:
    """Seconds of a whole step.

    Args:
        pace: The planner's times of this step; its momentum encoder moves 12 bytes a number.
        setup: How the step is laid out.
        launches: Launches of the network.
        around: What else the step does.
        bandwidth: Bytes a second of the card's memory.
    """
    added_bytes = around.momentum_bytes - TIMES["after"].momentum_bytes
    update_s = pace.update_s + added_bytes * count_momentum_weights(setup.shape) / bandwidth
    network_s = max(pace.compute_s + pace.elementwise_s, launches * _LAUNCH_S)
    update_s = max(update_s, (around.optimizer + around.momentum) * _LAUNCH_S)
    copy_s = around.copy_bytes * setup.images / _COPY_BANDWIDTH
    return network_s + update_s + pace.communication_s + around.waits * _WAIT_S + copy_s
