"""Nothing fits: what would? Each remedy is planned before it is named."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mocov3_ds.planning.architecture import rows_know_each_other
from mocov3_ds.planning.cards import GB, GIB
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.options import (
    STAGES,
    Option,
    PlannedRun,
    fitting_images,
    list_setups,
    rank_options,
)

_MOST_CARDS = 1024
_CARD_BYTES = {16: 16 * GIB, 24: 24 * GIB, 40: 40 * GIB, 48: 48 * GIB, 80: 80 * GIB} | {
    gb: gb * GB for gb in (141, 192, 288)
}
"""bytes of a card by the GB of its name, which from 141 on are 10^9 bytes"""

_Remedy = tuple[str, PlannedRun, Cluster, tuple[int, ...]]
"""what to change, as text, and run, cluster and stages after the change"""


def fitting_options(
    planned: PlannedRun, cluster: Cluster, stages: tuple[int, ...] = STAGES
) -> list[Option]:
    """The options of `rank_options`, of which at least the first fits.

    Raises:
        ValueError: nothing fits; the sentence says what would.
    """
    options = rank_options(planned, cluster, stages)
    if not options[0].fits:
        needed = min(option.memory.peak_bytes for option in options) / GIB
        is_one_pass = rows_know_each_other(planned.shape)
        pass_name = "its batch norm's one pass" if is_one_pass else "one image at a time"
        raise ValueError(
            f"{planned.recipe} at batch {planned.batch} does not fit on {cluster.title}: "
            f"{pass_name} needs {needed:.1f} GiB of {cluster.usable_bytes / GIB:.1f} that may be "
            f"filled ({planned.batch // cluster.cards} images a rank); what would fit: "
            f"{suggest_remedy(planned, cluster, stages)}."
        )
    return options


def suggest_remedy(planned: PlannedRun, cluster: Cluster, stages: tuple[int, ...] = STAGES) -> str:
    """What to change where nothing fits, as text.

    A smaller batch, more cards, a bigger card, or another stage than `stages`; else more and bigger
    cards together.
    """
    batches = list(_smaller_batches(planned, cluster))
    more_cards, bigger_cards = list(_more_cards(planned, cluster)), list(_bigger_cards(cluster))
    free_stages = [stage for stage in (1, 2, 0, 3) if stage not in stages]
    unfixed = "(without --stage or the stage of the DeepSpeed config)"
    single: list[Iterable[_Remedy]] = [
        ((f"--batch {size}", replace(planned, batch=size), cluster, stages) for size in batches),
        ((f"{larger.cards} of these cards", planned, larger, stages) for larger in more_cards),
        ((f"cards of {gb} GB", planned, bigger, stages) for gb, bigger in bigger_cards),
        ((f"ZeRO-{stage} {unfixed}", planned, cluster, (stage,)) for stage in free_stages),
    ]
    combined = (
        (f"{larger.cards} cards of {gb} GB", planned, bigger, stages)
        for larger in more_cards
        for gb, bigger in _bigger_cards(larger)
    )
    remedy = " or ".join(filter(None, map(_first_that_fits, single))) or _first_that_fits(combined)
    tried = [f"batches down to {size}" for size in batches[-1:]]
    tried += [f"up to {larger.cards} of these cards" for larger in more_cards[-1:]]
    tried += [f"cards of up to {gb} GB" for gb, _ in bigger_cards[-1:]]
    tried += ["more and bigger cards together"] * bool(more_cards and bigger_cards)
    return remedy or f"nothing that was tried ({', '.join(tried)})"


def _first_that_fits(remedies: Iterable[_Remedy]) -> str:
    for text, planned, cluster, stages in remedies:
        if any(fitting_images(setup, cluster) for setup in list_setups(planned, cluster, stages)):
            return text
    return ""


def _smaller_batches(planned: PlannedRun, cluster: Cluster) -> Iterator[int]:
    """Half the batch, a quarter, ..., that divide over the cards."""
    batch = planned.batch
    while batch > cluster.cards:
        batch = max(batch // 2 // cluster.cards, 1) * cluster.cards
        yield batch


def _more_cards(planned: PlannedRun, cluster: Cluster) -> Iterator[Cluster]:
    """Twice as many cards, four times, ..., that the batch divides over."""
    cards = cluster.cards * 2
    while cards <= min(_MOST_CARDS, planned.batch):
        if planned.batch % cards == 0:
            yield replace(cluster, cards=cards)
        cards *= 2


def _bigger_cards(cluster: Cluster) -> Iterator[tuple[int, Cluster]]:
    """As many cards of each larger memory, with the GB of their name."""
    for gb, size in _CARD_BYTES.items():
        if size > cluster.card.memory_bytes:
            yield gb, replace(cluster, card=replace(cluster.card, memory_bytes=size))
