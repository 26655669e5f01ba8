"""Every way to run a recipe on a cluster, best first, each with why or why not.

The step is exact at any chunk size, so "does it fit?" asks only whether the activations of one
image fit beside weights, gradients and what heads and loss need of the whole rank batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mocov3_ds.model.base_encoder import Chunks, EncoderShape
from mocov3_ds.optim.arguments import number
from mocov3_ds.planning import architecture, memory, pace, traffic
from mocov3_ds.planning.hardware import GB, GIB, Cluster
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.pace import Pace
from mocov3_ds.training import chunk_size

_STAGES = (0, 1, 2, 3)
_MOST_CARDS = 1024
_MEMORIES = {16: 16 * GIB, 24: 24 * GIB, 40: 40 * GIB, 48: 48 * GIB, 80: 80 * GIB} | {
    gb: gb * GB for gb in (141, 192, 288)
}
"""bytes of a card by the GB of its name, which from 141 on are 10^9 bytes"""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be trained."""

    recipe: str
    shape: EncoderShape
    batch: int
    epochs: float
    engine: dict[str, Any]
    """DeepSpeed JSON, with its optimizer block"""

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        for name in ("bf16", "fp16"):
            if (self.engine.get(name) or {}).get("enabled"):
                return name
        return "fp32"

    @property
    def size(self) -> int:
        """Bytes of a number of the network."""
        return 4 if self.precision == "fp32" else 2

    @property
    def optimizer(self) -> str:
        """Lower-case type of the optimizer block."""
        kind = str(self.engine["optimizer"]["type"]).lower()
        return {"adam": "adamw", "fusedlamb": "lamb"}.get(kind, kind)

    @property
    def persistence(self) -> int:
        """`stage3_param_persistence_threshold`."""
        return self._of_zero("stage3_param_persistence_threshold", traffic.PERSISTENCE)

    @property
    def bucket(self) -> int:
        """`reduce_bucket_size`."""
        return self._of_zero("reduce_bucket_size", memory.BUCKET)

    def _of_zero(self, key: str, default: int) -> int:
        zero = self.engine.get("zero_optimization") or {}
        return int(number(f"zero_optimization.{key}", zero.get(key, default), 0))


@dataclass(frozen=True)
class Option:
    """One way to run it."""

    stage: int
    recompute_blocks: bool
    chunks: Chunks
    key_block: int
    memory: Memory
    pace: Pace | None
    """None where it does not fit"""
    why: str = ""

    @property
    def fits(self) -> bool:
        """Whether it runs at all."""
        return self.pace is not None

    @property
    def passes(self) -> str:
        """How the rank's images go through the backbone."""
        if not self.fits:
            return "-"
        blocks = ", blocks recomputed" * self.recompute_blocks
        if not self.chunks.size:
            return f"one pass{blocks}"
        kept = f", {self.chunks.kept} kept" * bool(self.chunks.kept)
        return f"chunks of {self.chunks.size}{kept}{blocks}"


def all_options(wish: Wish, cluster: Cluster, stages: tuple[int, ...] = _STAGES) -> list[Option]:
    """Every stage with and without recomputed blocks: what fits first, and of that the fastest.

    Raises:
        ValueError: the batch does not divide over the cards, or card or stages have not the
            precision.
    """
    _check(wish, cluster)
    found = [_option(wish, cluster, stage, recompute) for stage, recompute in _ways(wish, stages)]
    if not found:
        raise ValueError(
            "fp16 has no stage 0 (DeepSpeed computes it wrongly); choose --stage 1, 2 or 3."
        )
    order = {1: 0, 2: 1, 0: 2, 3: 3}  # at the same speed

    def rank(option: Option) -> tuple[bool, float, bool, int]:
        seconds = option.pace.step if option.pace else option.memory.total
        return (not option.fits, round(seconds, 3), option.recompute_blocks, order[option.stage])

    found.sort(key=rank)
    return [replace(option, why=_why(option, found[0], wish, cluster)) for option in found]


def _ways(wish: Wish, stages: tuple[int, ...]) -> Iterator[tuple[int, bool]]:
    """Stage, and whether blocks are recomputed, of each option there is."""
    for stage in stages:
        if not (stage == 0 and wish.precision == "fp16"):
            yield from ((stage, False), (stage, True))


def _check(wish: Wish, cluster: Cluster) -> None:
    ranks = cluster.cards
    if wish.batch % ranks:
        near = wish.batch // ranks * ranks
        fits = f"{near} or {near + ranks}" if near else str(ranks)
        raise ValueError(
            f"the global batch {wish.batch} does not divide over {ranks} cards; choose --batch "
            f"{fits}, or another number of cards."
        )
    if wish.precision == "bf16" and not cluster.card.bf16:
        raise ValueError(
            f"{cluster.card.name} has no bf16; plan with --deepspeed_config "
            "ds_configs/zero1_adamw_fp16.json."
        )


def _option(wish: Wish, cluster: Cluster, stage: int, recompute: bool) -> Option:
    images = wish.batch // cluster.cards
    key_block = chunk_size.fitting_key_block(images, wish.batch)
    room = _images_that_fit(wish, cluster, stage, recompute, key_block)
    chunks = chunk_size.choose_chunks(room, images) if room else Chunks(size=1)
    held = _memory(wish, cluster, stage, recompute, key_block, chunks)
    speed = None
    if room:
        speed = pace.of_a_step(
            wish.shape,
            cluster,
            stage=stage,
            batch=wish.batch,
            precision=wish.precision,
            optimizer=wish.optimizer,
            chunks=chunks,
            recompute_blocks=recompute,
            persistence=wish.persistence,
            bucket=wish.bucket,
        )
    return Option(stage, recompute, chunks, key_block, held, speed)


def _memory(
    wish: Wish, cluster: Cluster, stage: int, recompute: bool, key_block: int, chunks: Chunks
) -> Memory:
    return memory.of_a_rank(
        wish.shape,
        stage=stage,
        world_size=cluster.cards,
        batch=wish.batch,
        size=wish.size,
        chunks=chunks,
        recompute_blocks=recompute,
        key_block=key_block,
        moments=1 if wish.optimizer == "lars" else 2,
        persistence=wish.persistence,
        bucket=wish.bucket,
    )


def _images_that_fit(
    wish: Wish, cluster: Cluster, stage: int, recompute: bool, key_block: int
) -> int:
    """Images whose activations fit at once, counting both views; at most twice the rank's batch.

    The largest for which the chunks that `fit` would choose stay within the card, found by halving:
    memory grows with it.
    """
    images = wish.batch // cluster.cards

    def fits(room: int) -> bool:
        chunks = chunk_size.choose_chunks(room, images)
        held = _memory(wish, cluster, stage, recompute, key_block, chunks)
        return held.total <= cluster.usable

    if fits(2 * images):
        return 2 * images
    low, high = 0, 2 * images
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _why(option: Option, best: Option, wish: Wish, cluster: Cluster) -> str:
    need, there = option.memory.total / GIB, cluster.usable / GIB
    if option.pace is None:
        return f"does not fit: an image at a time needs {need:.1f} of {there:.1f} GiB"
    if option is best:
        return "the fastest that fits"
    assert best.pace is not None
    slower = option.pace.step / best.pace.step - 1
    words = []
    if option.stage == 3 and cluster.cards > 1:
        gathered = sum(
            collective.payload
            for collective, _ in option.pace.wire
            if collective.purpose == "weights of each pass"
        )
        words.append(f"gathers up to {gathered / 1e9:.1f} GB of weights a step")
    if option.stage == 2 and best.stage == 1:
        words.append("holds what stage 1 holds: the whole gradient lives until the last chunk")
    if option.stage == 0 and cluster.cards > 1:
        words.append("optimizer state whole on each card")
    if option.recompute_blocks:
        words.append("computes each block twice")
    if slower >= 5e-4:
        words.append(f"{100 * slower:.1f} % slower")
    return "; ".join(words) or "the same speed"


def what_would_fit(wish: Wish, cluster: Cluster, stages: tuple[int, ...] = _STAGES) -> str:
    """The remedy where nothing fits; each was reckoned through.

    A smaller batch, more cards, a bigger card, or another stage than `stages`; else more and bigger
    cards together.
    """
    batches = list(_smaller_batches(wish, cluster))
    more, bigger = list(_more_cards(wish, cluster)), list(_bigger_cards(cluster))
    others = (stage for stage in (1, 2, 0, 3) if stage not in stages)
    without = "(without --stage or the stage of the DeepSpeed config)"
    alone: list[Iterable[_Case]] = [
        ((f"--batch {batch}", replace(wish, batch=batch), cluster, stages) for batch in batches),
        ((f"{larger.cards} of these cards", wish, larger, stages) for larger in more),
        ((f"cards of {gb} GB", wish, other, stages) for gb, other in bigger),
        ((f"ZeRO-{stage} {without}", wish, cluster, (stage,)) for stage in others),
    ]
    together = (
        (f"{larger.cards} cards of {gb} GB", wish, other, stages)
        for larger in more
        for gb, other in _bigger_cards(larger)
    )
    words = " or ".join(filter(None, map(_first_that_fits, alone))) or _first_that_fits(together)
    tried = [f"batches down to {batch}" for batch in batches[-1:]]
    tried += [f"up to {larger.cards} of these cards" for larger in more[-1:]]
    tried += [f"cards of up to {gb} GB" for gb, _ in bigger[-1:]]
    tried += ["more and bigger cards together"] * bool(more and bigger)
    return words or f"nothing that was tried ({', '.join(tried)})"


_Case = tuple[str, Wish, Cluster, tuple[int, ...]]


def _first_that_fits(cases: Iterable[_Case]) -> str:
    for words, wish, cluster, stages in cases:
        if _something_fits(wish, cluster, stages):
            return words
    return ""


def _smaller_batches(wish: Wish, cluster: Cluster) -> Iterator[int]:
    """Half the batch, a quarter, ..., that divide over the cards."""
    batch = wish.batch
    while batch > cluster.cards:
        batch = max(batch // 2 // cluster.cards, 1) * cluster.cards
        yield batch


def _more_cards(wish: Wish, cluster: Cluster) -> Iterator[Cluster]:
    """Twice as many cards, four times, ..., that the batch divides over."""
    cards = cluster.cards * 2
    while cards <= min(_MOST_CARDS, wish.batch):
        if wish.batch % cards == 0:
            yield replace(cluster, cards=cards)
        cards *= 2


def _bigger_cards(cluster: Cluster) -> Iterator[tuple[int, Cluster]]:
    """GB, and as many such cards."""
    for gb, size in _MEMORIES.items():
        if size > cluster.card.memory:
            yield gb, replace(cluster, card=replace(cluster.card, memory=size))


def _something_fits(wish: Wish, cluster: Cluster, stages: tuple[int, ...]) -> bool:
    key_block = chunk_size.fitting_key_block(wish.batch // cluster.cards, wish.batch)
    return any(
        _images_that_fit(wish, cluster, stage, recompute, key_block)
        for stage, recompute in _ways(wish, stages)
    )


def fitting_options(
    wish: Wish, cluster: Cluster, stages: tuple[int, ...] = _STAGES
) -> list[Option]:
    """As `all_options`.

    Raises:
        ValueError: nothing fits, and what would.
    """
    options = all_options(wish, cluster, stages)
    if not options[0].fits:
        least = min(option.memory.total for option in options) / GIB
        rows = wish.batch // cluster.cards
        raise ValueError(
            f"{wish.recipe} at batch {wish.batch} does not fit on {cluster.words}: one image at a "
            f"time needs {least:.1f} GiB of {cluster.usable / GIB:.1f} that may be filled ({rows} "
            f"images a rank); what would fit: {what_would_fit(wish, cluster, stages)}."
        )
    return options


def weights_in_millions(wish: Wish) -> float:
    """Weights of the base encoder with its heads, 10^6."""
    return architecture.weights(wish.shape) / 1e6
