"""Which cards are known, and how fast are they?

Rates are peaks from the makers' data sheets: dense, of the precision that training uses. What share
of them a ViT reaches is `reach`'s to say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mocov3_ds.optim.arguments import check_number
from mocov3_ds.planning import reach
from mocov3_ds.planning.reach import Reach
from mocov3_ds.settings.spelling import did_you_mean

GIB, GB = 2**30, 10**9


@dataclass(frozen=True, kw_only=True)
class Card:
    """One accelerator, or a machine without one."""

    name: str
    memory_bytes: float
    low_precision_rate: float
    """operations a second of matrix products in bf16 (fp16 where the card has no bf16)"""
    fp32_rate: float
    """operations a second of matrix products in fp32"""
    bandwidth: float
    """bytes a second of the card's memory"""
    reach: Reach
    """what a ViT reaches of the rates, how far that may be off, and what it rests on"""
    link_bandwidth: float
    """bytes a second, each way, between two cards of a machine"""
    per_node: int = 8
    """cards of a machine"""
    network_bandwidth: float = 12.5 * GB
    """bytes a second, each way, of a whole machine"""
    tf32_rate: float = 0.0
    """the same where inputs may be rounded to TF32; 0 = the card has none"""
    bf16: bool = True
    """whether the card computes in bf16"""
    needs: str = ""
    """what must be installed before it runs at all, beside what `pip install` brings"""
    reserved_bytes: float = 0.8 * GIB
    """memory that context, kernels and collectives take: assumed"""
    source: str = ""
    """where the peaks come from"""
    attention_rate: float = 0.0
    """operations a second of attention; 0 = as other matrix products"""
    elementwise_bandwidth: float = 0.0
    """bytes a second of norms, GELU and residuals, if measured; 0 = `reach`'s share of the above"""

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """What torch calls it."""
        return "cpu" if self.name == "cpu" else "cuda"

    def peak_rate(self, precision: str) -> float:
        """Operations a second of matrix products in fp32, tf32, bf16 or fp16."""
        rates = {"fp32": self.fp32_rate, "tf32": self.tf32_rate}
        return rates.get(precision, self.low_precision_rate)


def _card(
    name: str,
    gib: float,
    low_precision_tera: float,
    fp32_tera: float,
    bandwidth_gb: float,
    reached: Reach,
    *,
    link_gb: float,
    network_gbit: float,
    source: str,
    tf32_tera: float = 0.0,
    per_node: int = 8,
    bf16: bool = True,
    needs: str = "",
) -> Card:
    return Card(
        name=name,
        memory_bytes=gib * GIB,
        low_precision_rate=low_precision_tera * 1e12,
        fp32_rate=fp32_tera * 1e12,
        bandwidth=bandwidth_gb * GB,
        reach=reached,
        link_bandwidth=link_gb * GB,
        per_node=per_node,
        network_bandwidth=network_gbit / 8 * GB,
        tf32_rate=tf32_tera * 1e12,
        bf16=bf16,
        needs=needs,
        source=source,
    )


_PCIE4 = 25.0
"""GB/s each way that collectives over PCIe 4.0 x16 (31.5) leave: assumed"""
_PCIE3, _PCIE5 = 12.0, 50.0
_V100_SHEET = "NVIDIA V100 SXM2 data sheet (fp16); NVLink 300 GB/s both ways; EDR"
_V100_NEEDS = (
    "a torch built for CUDA 12 (pytorch.org, previous versions): the stock one has no kernels for "
    "compute capability 7.0"
)

# fmt: off
PRESETS = {
    card.name: card
    for card in (
        _card("T4", 15, 65, 8.1, 320, reach.VOLTA, link_gb=_PCIE3, network_gbit=25, bf16=False,
              source="NVIDIA T4 data sheet (fp16); PCIe 3.0"),
        _card("V100-16GB", 16, 125, 15.7, 900, reach.VOLTA, link_gb=150, network_gbit=100,
              bf16=False, needs=_V100_NEEDS, source=_V100_SHEET),
        _card("V100-32GB", 32, 125, 15.7, 900, reach.VOLTA, link_gb=150, network_gbit=100,
              bf16=False, needs=_V100_NEEDS, source=_V100_SHEET),
        _card("RTX3090", 24, 71, 35.6, 936, reach.GA102,
              tf32_tera=35.6, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA GA102 white paper (fp32 accumulation); PCIe 4.0"),
        _card("RTX4090", 24, 165.2, 82.6, 1008, reach.AD102,
              tf32_tera=82.6, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA Ada white paper (fp32 accumulation); PCIe 4.0"),
        _card("L4", 24, 121, 30.3, 300, reach.ASSUMED,
              tf32_tera=60, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA L4 data sheet, dense; PCIe 4.0"),
        _card("A10", 24, 125, 31.2, 600, reach.ASSUMED,
              tf32_tera=62.5, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA A10 data sheet; PCIe 4.0"),
        _card("A100-40GB", 40, 312, 19.5, 1555, reach.A100,
              tf32_tera=156, link_gb=300, network_gbit=1600,
              source="NVIDIA A100 SXM data sheet; NVLink 600 GB/s both ways; 8 x HDR"),
        _card("A100-80GB", 80, 312, 19.5, 2039, reach.A100,
              tf32_tera=156, link_gb=300, network_gbit=1600,
              source="NVIDIA A100 SXM data sheet; NVLink 600 GB/s both ways; 8 x HDR"),
        _card("L40S", 48, 362, 91.6, 864, reach.ASSUMED,
              tf32_tera=183, link_gb=_PCIE4, network_gbit=100,
              source="NVIDIA L40S data sheet, dense; PCIe 4.0"),
        _card("H100-80GB", 80, 989.4, 66.9, 3350, reach.HOPPER,
              tf32_tera=494.7, link_gb=450, network_gbit=3200,
              source="NVIDIA H100 SXM data sheet, dense; NVLink 900 GB/s both ways; 8 x NDR"),
        _card("H200", 141 / 1.073741824, 989.4, 66.9, 4800, reach.HOPPER,
              tf32_tera=494.7, link_gb=450,
              network_gbit=3200,
              source="NVIDIA H200 SXM data sheet, dense; NVLink 900 GB/s both ways; 8 x NDR"),
        _card("A6000", 48, 154.8, 38.7, 768, reach.ASSUMED,
              tf32_tera=77.4, link_gb=_PCIE4, network_gbit=25,
              source="NVIDIA RTX A6000 data sheet, dense; PCIe 4.0"),
        _card("H20", 96, 148, 44, 4000, reach.ASSUMED,
              tf32_tera=74, link_gb=450, network_gbit=3200,
              source="NVIDIA H20 data sheet, dense; NVLink 900 GB/s both ways; 8 x NDR"),
        _card("RTX5090", 32, 209.5, 104.8, 1792, reach.ASSUMED,
              tf32_tera=104.8, link_gb=_PCIE5, network_gbit=25,
              source="NVIDIA RTX Blackwell white paper (fp32 accumulation); PCIe 5.0"),
        _card("RTXPRO6000", 96, 503.8, 125, 1792, reach.ASSUMED,
              tf32_tera=251.9, link_gb=_PCIE5, network_gbit=100,
              source="NVIDIA RTX PRO 6000 Blackwell data sheet, dense; PCIe 5.0"),
        _card("B200", 180, 2250, 75, 7700, reach.ASSUMED,
              tf32_tera=1125, link_gb=900, network_gbit=3200,
              source="NVIDIA DGX B200 data sheet, dense; NVLink 1,800 GB/s both ways; 8 x NDR"),
        _card("GB200", 186, 2500, 80, 8000, reach.ASSUMED,
              tf32_tera=1250, link_gb=900, network_gbit=1600,
              per_node=4,
              source="NVIDIA GB200 NVL72 data sheet, dense, a tray of four; NVLink 1,800 GB/s both "
              "ways, which reaches further than a tray; 4 x NDR"),
        _card("MI300X", 192, 1307.4, 163.4, 5300, reach.ASSUMED,
              tf32_tera=653.7, link_gb=448, network_gbit=3200,
              source="AMD MI300X data sheet, dense; Infinity Fabric 7 x 64 GB/s each way; planned "
              "only, as this program has not been tried under ROCm"),
        # eight cores with AVX-512; measure your own with --calibrate
        _card("cpu", 24, 0.5, 0.5, 40, reach.MACHINE, link_gb=5, network_gbit=10, per_node=1,
              source="a guess; --calibrate FILE measures this machine, --rates FILE uses it"),
    )
}
# fmt: on

_MEMORY_CLASSES = {
    "16GB": "T4",
    "24GB": "RTX3090",
    "32GB": "RTX5090",
    "40GB": "A100-40GB",
    "48GB": "A6000",
    "80GB": "A100-80GB",
    "96GB": "H20",
    "141GB": "H200",
    "180GB": "B200",
    "192GB": "MI300X",
}
"""what a card named by its memory alone is taken to be: the slowest of its kind in wide use"""
_ALIASES = {
    "H100": "H100-80GB",
    "A100": "A100-80GB",
    "V100": "V100-32GB",
    "H200-141GB": "H200",
    "RTXA6000": "A6000",
    "MI300": "MI300X",
}


def find_card(name: str, presets: Mapping[str, Card]) -> Card:
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


def describe_own_card(name: str, *, memory: float, tflops: float, bandwidth: float) -> Card:
    """A card that no preset describes.

    Args:
        name: what it is called.
        memory: its memory in GiB.
        tflops: 10^12 operations a second of matrix products in bf16, dense; half of it in TF32, a
            sixteenth in fp32.
        bandwidth: GB/s of its memory.

    Raises:
        ValueError: the name is a preset's, or a number is missing or impossible.
    """
    if name.upper() in {preset.upper() for preset in (*PRESETS, *_ALIASES, *_MEMORY_CLASSES)}:
        raise ValueError(f"--card {name} is the name of a preset (--list); give another name.")
    for flag, number in (("memory", memory), ("tflops", tflops), ("bandwidth", bandwidth)):
        check_number(f"--{flag}", number, 0)
        if not number:
            raise ValueError(f"--card {name} needs --memory, --tflops and --bandwidth, above 0.")
    source = "given on the command line; PCIe 4.0 unless --interconnect says more"
    return _card(name, memory, tflops, tflops / 16, bandwidth, reach.ASSUMED, link_gb=_PCIE4,
                 tf32_tera=tflops / 2, network_gbit=25, source=source)  # fmt: skip


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
        "| card | memory, GiB | bf16 (fp16), TFLOP/s | tf32 | fp32 | memory, GB/s | between cards, "
        "GB/s | machine, Gbit/s | what a ViT reaches of the peak, and what that rests "
        "on | source of the peaks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {card.name} | {card.memory_bytes / GIB:.0f} | {card.low_precision_rate / 1e12:g} "
        f"| {card.tf32_rate / 1e12:g} | {card.fp32_rate / 1e12:g} | {card.bandwidth / GB:g} "
        f"| {card.link_bandwidth / GB:g} | {card.network_bandwidth * 8 / GB:g} | {card.reach} "
        f"| {card.source} |"
        for card in PRESETS.values()
    ]
    classes = ", ".join(f"{name} = {card}" for name, card in _MEMORY_CLASSES.items())
    return "\n".join([*lines, "", f"Named by memory alone: {classes}."])
