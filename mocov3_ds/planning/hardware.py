"""Which machines, and how are they wired: what is `16x24GB`?"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mocov3_ds.model.chunking import MEMORY_MARGIN
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.planning.cards import GB, PRESETS, Card, find_card


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
    presets: Mapping[str, Card] | None = None,
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
