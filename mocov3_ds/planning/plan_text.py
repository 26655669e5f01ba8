"""What does a plan say: as text for people, as JSON for programs."""

from dataclasses import dataclass
from typing import Any

from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.chunking import MEMORY_MARGIN
from mocov3_ds.planning.architecture import count_weights
from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.memory import Memory, Phase
from mocov3_ds.planning.options import Option, PlannedRun
from mocov3_ds.planning.pace import DECODE_CPU_S, IMAGE_BYTES, IMAGENET, STORAGE_CPU_S, Pace
from mocov3_ds.planning.run_time import RunTime, plan_run_time

SCHEMA = 2
"""version of the JSON; raised when a key goes or changes its meaning"""
_BAR = 60
"""characters of the bar of a full card"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is told about one run on one cluster."""

    planned: PlannedRun
    cluster: Cluster
    options: list[Option]
    """best first; the first one fits"""
    price: float
    """of a card and hour, in any currency; 0 = unknown"""
    images: int = IMAGENET
    """images of an epoch"""
    cores: int = 0
    """CPU cores of a machine; 0 = as many as the loader takes"""
    launch: str
    """command line that starts the best option"""

    def run_time(self, pace: Pace, epochs: float) -> RunTime:
        """Time of a run of so many epochs at a pace."""
        return plan_run_time(
            self.planned, pace, self.cluster, epochs=epochs, images=self.images, cores=self.cores
        )


def format_plan(plan: Plan) -> str:
    """The whole plan as text."""
    best, cluster = plan.options[0], plan.cluster
    assert best.pace is not None
    phase = best.memory.peak_phase
    sections = [
        headline(plan.planned, cluster),
        "\nAll options, best first:\n",
        tabulate_options(plan.options),
        f"\nMemory of a card at its peak ({phase}: {_PHASES[phase]}):\n",
        memory_lines(best.memory, cluster),
        "\nTime of a step:\n",
        time_lines(plan.planned, cluster, best.pace),
        *([f"\n{compression_lines(plan.planned, best.pace)}"] if best.pace.phases else []),
        f"\nData: {data_line(best.pace, cluster)}",
        f"\n{hours_lines(plan, best.pace)}",
        f"\nStart it:\n\n    {plan.launch}",
    ]
    if cluster.card.needs:
        sections.insert(1, f"{cluster.card.name} needs {cluster.card.needs}.")
    return "\n".join(sections)


_PHASES: dict[Phase, str] = {
    "keys": "a chunk of keys passes while the queries wait",
    "loss": "queries meet keys",
    "heads": "the backward leaves the heads",
    "turn": "the backward reaches the backbone",
    "middle": "the whole gradient has gathered",
    "reduce": "a bucket of gradients is copied to be reduced",
    "update": "the optimizer is given its gradient",
}


def headline(planned: PlannedRun, cluster: Cluster) -> str:
    """What is planned, in one line."""
    weights = count_weights(planned.shape) / 1e6
    return (
        f"{planned.recipe}: {shape_name(planned.shape.backbone)} ({weights:.1f} M "
        f"weights with heads), global batch {planned.batch} on {cluster.title}, "
        f"{planned.batch // cluster.cards} images a rank, {planned.precision}, "
        f"{_optimizer_name(planned)}, {planned.epochs:g} epochs. Computed, not measured."
    )


def tabulate_options(options: list[Option]) -> str:
    """A line for each option, as markdown."""
    lines = [
        "| ZeRO | passes | GiB a card | images/s | MFU, % | s a step | why, why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for option in options:
        speed = "- | - | -"
        if option.pace is not None:
            pace = option.pace
            speed = f"{pace.images_per_s:.0f} | {100 * pace.mfu:.1f} | {pace.step_s:.3g}"
        lines.append(
            f"| {option.setup.stage} | {option.passes} | {option.memory.peak_bytes / GIB:.2f} "
            f"| {speed} | {option.why} |"
        )
    return "\n".join(lines)


def memory_lines(memory: Memory, cluster: Cluster) -> str:
    """Each item with its bar; what is not alive at the peak in brackets."""
    card, usable = cluster.card, cluster.usable_bytes
    lines = []
    for item in memory.items:
        if item.bytes < 1:
            continue
        gib = item.bytes / GIB
        alive = memory.peak_phase in item.alive
        number = f"{gib:9.3f}" if alive else f"({gib:.3f})".rjust(10)[-10:]
        bar = "#" * round(_BAR * item.bytes / card.memory_bytes) if alive else ""
        lines.append(f"  {item.name:<30}{number:>11}  {bar}".rstrip())
    margin = card.memory_bytes - card.reserved_bytes - usable
    lines += [
        f"  {'sum at the peak':<30}{memory.peak_bytes / GIB:>11.3f}  of {usable / GIB:.1f} GiB "
        "that may be filled",
        f"  {'context, collectives (assumed)':<30}{card.reserved_bytes / GIB:>11.3f}",
        f"  {f'margin ({1 - MEMORY_MARGIN:.0%})':<30}{margin / GIB:>11.3f}",
        f"  {'card':<30}{card.memory_bytes / GIB:>11.3f}",
    ]
    return "\n".join(lines)


def time_lines(planned: PlannedRun, cluster: Cluster, pace: Pace) -> str:
    """Where the time goes, and what the rates rest on."""
    card = cluster.card
    rate = card.peak_rate(planned.precision)
    elementwise = f"{card.reach.elementwise:.0%} of {card.bandwidth / 1e9:g} GB/s (fitted)"
    if card.elementwise_bandwidth:
        elementwise = f"{card.elementwise_bandwidth / 1e9:.1f} GB/s (measured)"
    lines = [
        f"  {'matrix products':<30}{pace.compute_s:>11.4f} s  "
        f"{card.reach.products:.0%} of {rate / 1e12:g} TFLOP/s ({card.reach.source})",
        f"  {'norms, GELU, residuals':<30}{pace.elementwise_s:>11.4f} s  {elementwise}",
        f"  {'optimizer, momentum encoder':<30}{pace.update_s:>11.4f} s",
    ]
    for collective, seconds in pace.collectives:
        megabytes = collective.wire_bytes(cluster.cards) / 1e6
        calls = f"{collective.calls} x {collective.operation}"
        lines.append(
            f"  {collective.purpose:<30}{seconds:>11.4f} s  {megabytes:.3f} MB a link, {calls}"
        )
    communication = 100 * pace.communication_s / pace.step_s
    lines.append(
        f"  {'step':<30}{pace.step_s:>11.4f} s  {pace.images_per_s:.0f} images/s, MFU "
        f"{100 * pace.mfu:.1f} %, {communication:.1f} % communication (nothing overlaps)"
    )
    return "\n".join(lines)


def compression_lines(planned: PlannedRun, pace: Pace) -> str:
    """What the steps of a run cost whose sequences are shorter at first, and what that saves."""
    operations = sum(phase.share * phase.operations for phase in pace.phases)
    lines = [
        f"Steps under --compress {planned.compress} (the step above is over whole sequences):\n",
        "| share of the steps | patches of a query, key | patch scale | s a step | operations, % |",
        "|---|---|---|---|---|",
    ]
    for phase in pace.phases:
        length = phase.length
        lines.append(
            f"| {100 * phase.share:.1f} % | {length.query_patches}, {length.key_patches} "
            f"| {length.patch_scale:g} | {phase.step_s:.3g} "
            f"| {100 * phase.operations / pace.operations:.1f} |"
        )
    lines.append(
        f"\nOn average {pace.mean_step_s:.3g} s a step, {100 * operations / pace.operations:.1f} % "
        f"of the operations of whole sequences, MFU "
        f"{100 * operations / pace.mean_step_s / pace.peak_rate:.1f} %."
    )
    return "\n".join(lines)


def data_line(pace: Pace, cluster: Cluster) -> str:
    """What the loaders of all machines must give, so that no step waits for them."""
    while_short = " while the sequences are shortest" * bool(pace.phases)
    a_node = f" ({pace.loader_cores / cluster.nodes:.1f} a machine)" * (cluster.nodes > 1)
    return (
        f"{pace.read_mb_per_s:.0f} MB/s of JPEG ({IMAGE_BYTES / 1e3:.0f} kB an image) and "
        f"{pace.loader_cores:.1f} CPU cores{a_node} to read and decode{while_short} "
        f"({(DECODE_CPU_S + STORAGE_CPU_S) * 1e3:.2f} ms of CPU an image, BENCHMARKS.md)"
    )


def hours_lines(plan: Plan, pace: Pace) -> str:
    """Hours of 100 epochs and of the recipe's with their range, what they cost and rest on."""
    cards, price = plan.cluster.cards, plan.price
    lines = []
    for epochs in dict.fromkeys((100.0, plan.planned.epochs)):
        time = plan.run_time(pace, epochs)
        line = (
            f"{epochs:g} epochs of {plan.images:,} images: {_span(time, 1)} hours, "
            f"{_span(time, cards)} card hours"
        )
        if price:
            line += f", {_span(time, cards * price)} at {price:g} a card and hour"
        lines.append(line)
    extra = time.knn_s + time.save_s
    lines.append(
        f"Of these {100 * extra / 3600 / time.hours:.1f} % are k-NN evaluations and saves. "
        f"The range is what to expect of {plan.cluster.card.name}: {plan.cluster.card.reach}."
    )
    if time.loader_bound:
        needed = pace.loader_cores / plan.cluster.nodes
        lines.append(
            f"The cards wait for the loader: {plan.cores} cores a machine read and decode a batch "
            f"in {time.loader_s:.3g} s, a step takes {time.shortest_step_s:.3g} s; {needed:.0f} "
            "cores a machine would do, or shards made with --resize 384."
        )
    return "\n".join(lines)


def _span(time: RunTime, factor: float) -> str:
    """Hours times a factor, with the range where it is not known to the digit."""
    digits = 1 if time.hours * factor < 100 else 0
    middle = f"{time.hours * factor:,.{digits}f}"
    if time.spread == 1:
        return middle
    low, high = (hours * factor for hours in (time.low_hours, time.high_hours))
    return f"{middle} ({low:,.{digits}f} to {high:,.{digits}f})"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, bytes a second."""
    planned, cluster = plan.planned, plan.cluster
    card = cluster.card
    return {
        "schema": SCHEMA,
        "recipe": planned.recipe,
        "batch": planned.batch,
        "epochs": planned.epochs,
        "compress": planned.compress,
        "images": plan.images,
        "cores_a_machine": plan.cores,
        "precision": planned.precision,
        "optimizer": _optimizer_name(planned),
        "hardware": {
            "card": card.name,
            "cards": cluster.cards,
            "nodes": cluster.nodes,
            "memory": card.memory_bytes,
            "usable": cluster.usable_bytes,
            "reach": card.reach.products,
            "reach_source": card.reach.source,
            "elementwise_reach": card.reach.elementwise,
            "spread": card.reach.spread,
            "link": cluster.link_bandwidth,
        },
        "options": [_option_as_json(plan, option) for option in plan.options],
        "launch": plan.launch,
    }


def _option_as_json(plan: Plan, option: Option) -> dict[str, Any]:
    setup, memory = option.setup, option.memory
    values: dict[str, Any] = {
        "stage": setup.stage,
        "fits": option.fits,
        "recompute_blocks": setup.recompute_blocks,
        "chunk": setup.chunks.size,
        "keep_chunks": setup.chunks.keep,
        "why": option.why,
        "memory": {
            "total": memory.peak_bytes,
            "peak": memory.peak_phase,
            "parts": {item.name: item.bytes for item in memory.items},
        },
    }
    return values if option.pace is None else values | _pace_as_json(plan, option.pace)


def _pace_as_json(plan: Plan, pace: Pace) -> dict[str, Any]:
    cards, time = plan.cluster.cards, plan.run_time(pace, plan.planned.epochs)
    return {
        "step_s": pace.step_s,
        "mean_step_s": pace.mean_step_s,
        "compute_s": pace.compute_s,
        "elementwise_s": pace.elementwise_s,
        "update_s": pace.update_s,
        "communication_s": pace.communication_s,
        "images_per_s": pace.images_per_s,
        "mfu": pace.mfu,
        "communication": {
            collective.purpose: {
                "operation": collective.operation,
                "calls": collective.calls,
                "payload": collective.payload,
                "wire": collective.wire_bytes(cards),
                "seconds": seconds,
            }
            for collective, seconds in pace.collectives
        },
        "read_mb_per_s": pace.read_mb_per_s,
        "loader_cores": pace.loader_cores,
        "loader_s": time.loader_s,
        "steps": time.steps,
        "knn_s": time.knn_s,
        "save_s": time.save_s,
        "hours_of_100_epochs": plan.run_time(pace, 100).hours,
        "hours": time.hours,
        "hours_low": time.low_hours,
        "hours_high": time.high_hours,
        "cost": time.hours * cards * plan.price,
        "cost_low": time.low_hours * cards * plan.price,
        "cost_high": time.high_hours * cards * plan.price,
    }


def _optimizer_name(planned: PlannedRun) -> str:
    return planned.optimizer.__name__.lower()
