"""Which cards are known, how fast are they, and what is `16x24GB`?

Rates are peaks from the makers' data sheets: dense, of the precision that training uses. What share
of its peak a card reaches on a ViT's matrix products (`Card.reachable_share`) was not measured
here, where there is no GPU: it is set so that `pace` reproduces published speeds, each named beside
its share.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mocov3_ds.model.chunking import MEMORY_MARGIN
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.settings.spelling import did_you_mean

GIB, GB = 2**30, 10**9

# share of the peak that a ViT's matrix products reach, and where the number comes from
_AMPERE = (
    0.62,
    "timm's training speeds of ViT-B, L and H on an RTX 3090 (391, 117 and 39.9 images/s) within "
    "7 %",
)
_A100 = (0.50, "DINOv2's ViT-L/16 recipe on 32 A100 (45 % of the peak in all)")
_HOPPER = (0.45, "torchtitan's Llama-3 8B on H100 (39 % of the peak in all)")
_GUESS = (0.50, "assumed, no published ViT training speed at hand")
_CPU = (1.00, "assumed; --calibrate measures this machine")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One accelerator, or a machine without one."""

    name: str
    memory_bytes: float
    low_precision_rate: float
    """operations a second of matrix products in bf16 (fp16 where the card has no bf16)"""
    fp32_rate: float
    """operations a second of matrix products in fp32 (tf32 where the card has it)"""
    bandwidth: float
    """bytes a second of the card's memory"""
    reachable_share: float
    """share of both rates that a ViT's matrix products reach, 0 to 1"""
    reachable_source: str
    """the share and where it comes from, as text"""
    link_bandwidth: float
    """bytes a second, each way, between two cards of a machine"""
    per_node: int = 8
    """cards of a machine"""
    network_bandwidth: float = 12.5 * GB
    """bytes a second, each way, of a whole machine"""
    bf16: bool = True
    """whether the card computes in bf16"""
    reserved_bytes: float = 0.8 * GIB
    """memory that context, kernels and collectives take: assumed"""
    source: str = ""
    """where the peaks come from"""
    attention_rate: float = 0.0
    """operations a second of attention; 0 = as other matrix products"""
    elementwise_bandwidth: float = 0.0
    """bytes a second of norms, GELU and residuals; 0 = `ELEMENTWISE_SHARE` of `bandwidth`"""

    def peak_rate(self, precision: str) -> float:
        """Operations a second of matrix products in fp32, bf16 or fp16."""
        return self.fp32_rate if precision == "fp32" else self.low_precision_rate


ELEMENTWISE_SHARE = 0.8
"""share of the memory bandwidth that element-wise kernels reach: assumed"""


def _card(
    name: str,
    gib: float,
    low_precision_tera: float,
    fp32_tera: float,
    bandwidth_gb: float,
    reachable: tuple[float, str],
    *,
    link_gb: float,
    network_gbit: float,
    source: str,
    per_node: int = 8,
    bf16: bool = True,
) -> Card:
    share, share_source = reachable
    return Card(
        name=name,
        memory_bytes=gib * GIB,
        low_precision_rate=low_precision_tera * 1e12,
        fp32_rate=fp32_tera * 1e12,
        bandwidth=bandwidth_gb * GB,
        reachable_share=share,
        reachable_source=f"{share:.2f}: {share_source}",
        link_bandwidth=link_gb * GB,
        per_node=per_node,
        network_bandwidth=network_gbit / 8 * GB,
        bf16=bf16,
        source=source,
    )


_PCIE4 = 25.0
"""GB/s each way that collectives over PCIe 4.0 x16 (31.5) leave: assumed"""
_PCIE3 = 12.0

# fmt: off
PRESETS = {
    card.name: card
    for card in (
        _card("T4", 15, 65, 8.1, 320, _GUESS, link_gb=_PCIE3, network_gbit=25, bf16=False,
              source="NVIDIA T4 data sheet (fp16); PCIe 3.0"),
        _card("V100-16GB", 16, 125, 15.7, 900, _GUESS, link_gb=150, network_gbit=100, bf16=False,
              source="NVIDIA V100 SXM2 data sheet (fp16); NVLink 300 GB/s both ways; EDR"),
        _card("V100-32GB", 32, 125, 15.7, 900, _GUESS, link_gb=150, network_gbit=100, bf16=False,
              source="NVIDIA V100 SXM2 data sheet (fp16); NVLink 300 GB/s both ways; EDR"),
        _card("RTX3090", 24, 71, 35.6, 936, _AMPERE, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA GA102 white paper (fp32 accumulation); PCIe 4.0"),
        _card("RTX4090", 24, 165.2, 82.6, 1008, _AMPERE, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA Ada white paper (fp32 accumulation); PCIe 4.0"),
        _card("L4", 24, 121, 60, 300, _GUESS, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA L4 data sheet, dense; PCIe 4.0"),
        _card("A10", 24, 125, 62.5, 600, _GUESS, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA A10 data sheet; PCIe 4.0"),
        _card("A100-40GB", 40, 312, 156, 1555, _A100, link_gb=300, network_gbit=1600,
              source="NVIDIA A100 SXM data sheet; NVLink 600 GB/s both ways; 8 x HDR"),
        _card("A100-80GB", 80, 312, 156, 2039, _A100, link_gb=300, network_gbit=1600,
              source="NVIDIA A100 SXM data sheet; NVLink 600 GB/s both ways; 8 x HDR"),
        _card("L40S", 48, 362, 183, 864, _GUESS, link_gb=_PCIE4, network_gbit=100,
              source="NVIDIA L40S data sheet, dense; PCIe 4.0"),
        _card("H100-80GB", 80, 989.4, 494.7, 3350, _HOPPER, link_gb=450, network_gbit=3200,
              source="NVIDIA H100 SXM data sheet, dense; NVLink 900 GB/s both ways; 8 x NDR"),
        _card("H200", 141 / 1.073741824, 989.4, 494.7, 4800, _HOPPER, link_gb=450,
              network_gbit=3200,
              source="NVIDIA H200 SXM data sheet, dense; NVLink 900 GB/s both ways; 8 x NDR"),
        # eight cores with AVX-512; measure your own with --calibrate
        _card("cpu", 24, 0.5, 0.5, 40, _CPU, link_gb=5, network_gbit=10, per_node=1,
              source="a guess; --calibrate FILE measures this machine, --rates FILE uses it"),
    )
}
# fmt: on

_MEMORY_CLASSES = {"16GB": "T4", "24GB": "RTX3090", "40GB": "A100-40GB", "80GB": "A100-80GB"}
"""what a card named by its memory alone is taken to be: the slowest of its kind in wide use"""
_ALIASES = {"H100": "H100-80GB", "A100": "A100-80GB", "V100": "V100-32GB", "H200-141GB": "H200"}


@dataclass(frozen=True)
class Cluster:
    """Equal cards on equal machines."""

    card: Card
    cards: int
    """all cards together"""
    per_node: int
    """cards of a machine"""

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.cards // self.per_node)

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second that a ring over all cards passes through its narrowest link."""
        card = self.card
        if self.nodes == 1:
            return card.link_bandwidth
        return min(card.link_bandwidth, card.network_bandwidth)

    @property
    def latency_s(self) -> float:
        """Seconds from one message of a ring to the next: assumed."""
        return 5e-6 if self.nodes == 1 else 15e-6

    @property
    def usable_bytes(self) -> float:
        """Bytes of a card that a plan may fill."""
        return (self.card.memory_bytes - self.card.reserved_bytes) * MEMORY_MARGIN

    @property
    def title(self) -> str:
        """As a user would write it, e.g. `16 x H100-80GB on 2 machines`."""
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        return f"{self.cards} x {self.card.name}{machines}"


def read_cluster(
    text: str,
    *,
    nodes: int = 0,
    interconnect: float = 0.0,
    network: float = 0.0,
    presets: dict[str, Card] | None = None,
) -> Cluster:
    """A cluster from `16x24GB`, `8xH100-80GB`, `4xL40S` or `1xcpu`.

    Args:
        text: number of cards, x, and the name of a preset or the memory of a card.
        nodes: machines; 0 = as few as hold the cards, the same number each and at most 8 (a CPU
            alone).
        interconnect: GB/s each way between two cards of a machine; 0 = the preset's.
        network: Gbit/s each way of a machine; 0 = the preset's.
        presets: cards by name; `PRESETS` by default.

    Raises:
        ValueError: the text is not of that form, the card is unknown, or the cards do not divide
            over `nodes`.
    """
    match = re.fullmatch(r"(\d+)\s*[xX*]\s*(\S+)", text.strip())
    if match is None:
        raise ValueError(
            f"--gpus {text!r} is not of the form COUNTxCARD, e.g. 16x24GB or 8xH100-80GB."
        )
    cards, card = int(match[1]), find_card(match[2], presets or PRESETS)
    if not 1 <= cards <= 1024:
        raise ValueError(f"--gpus {text}: {cards} cards; the planner reckons with 1 to 1024.")
    if nodes < 0 or (nodes and cards % nodes):
        raise ValueError(f"{cards} cards do not divide over --nodes {nodes}.")
    check_number("--interconnect", interconnect, 0)
    check_number("--network", network, 0)
    card = replace(
        card,
        link_bandwidth=interconnect * GB or card.link_bandwidth,
        network_bandwidth=network / 8 * GB or card.network_bandwidth,
    )
    # a launcher starts as many ranks on each machine
    even = max(count for count in range(1, card.per_node + 1) if cards % count == 0)
    return Cluster(card, cards, cards // nodes if nodes else even)


def find_card(name: str, presets: dict[str, Card]) -> Card:
    """A preset by its name in upper or lower case; `24GB` names a class of cards.

    Raises:
        ValueError: there is no card of that name.
    """
    names = {preset.upper(): preset for preset in (*presets, *_ALIASES, *_MEMORY_CLASSES)}
    if name.upper() not in names:
        hint = did_you_mean(name, names.values(), cutoff=0.5)
        raise ValueError(
            f"no card {name!r} is known{hint}; there are {', '.join((*presets, *_MEMORY_CLASSES))}."
        )
    exact = names[name.upper()]
    if exact in _MEMORY_CLASSES:
        model = presets[_MEMORY_CLASSES[exact]]
        return replace(model, name=f"{exact} (as {model.name})")
    return presets[_ALIASES.get(exact, exact)]


def find_card_of_device(device_name: str) -> Card | None:
    """The preset of a device by the name its driver gives, e.g. `NVIDIA A100-SXM4-80GB`.

    None where it is not among the presets, or one of another form of it (H100 PCIe).
    """
    name_words = re.sub(r"[^A-Z0-9]+", " ", device_name.upper().replace("RTX ", "RTX")).split()
    for preset, card in PRESETS.items():
        if "PCIE" not in name_words and all(
            word in name_words for word in preset.upper().split("-")
        ):
            return card
    return None


def format_presets() -> str:
    """Table of the presets, as markdown."""
    lines = [
        "| card | memory, GiB | bf16 (fp16), TFLOP/s | fp32 (tf32) | memory, GB/s | between cards, "
        "GB/s | machine, Gbit/s | share of the peak that is reckoned with | source of the peaks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {card.name} | {card.memory_bytes / GIB:.0f} | {card.low_precision_rate / 1e12:g} "
        f"| {card.fp32_rate / 1e12:g} | {card.bandwidth / GB:g} | {card.link_bandwidth / GB:g} "
        f"| {card.network_bandwidth * 8 / GB:g} | {card.reachable_source} | {card.source} |"
        for card in PRESETS.values()
    ]
    classes = ", ".join(f"{name} = {card}" for name, card in _MEMORY_CLASSES.items())
    return "\n".join([*lines, "", f"Named by memory alone: {classes}."])


def read_rates(path: Path) -> dict[str, Card]:
    """The presets, with `cpu` as `--calibrate` measured it.

    Raises:
        ValueError: the file is missing, or `--calibrate` did not write it.
    """
    try:
        rates = json.loads(path.read_text())
        cpu = replace(
            PRESETS["cpu"],
            memory_bytes=float(rates["memory_bytes"]),
            low_precision_rate=float(rates["bf16_operations_per_s"]),
            fp32_rate=float(rates["fp32_operations_per_s"]),
            bandwidth=float(rates["copy_bytes_per_s"]),
            attention_rate=float(rates["attention_operations_per_s"]),
            elementwise_bandwidth=float(rates["elementwise_bytes_per_s"]),
            reachable_source=f"1.00: measured, {path}",
            source=f"measured on {rates['machine']}, {rates['threads']} threads",
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of measured rates ({error!r}); make one with "
            f"mocov3 plan --calibrate {path}."
        ) from None
    return PRESETS | {"cpu": cpu}
