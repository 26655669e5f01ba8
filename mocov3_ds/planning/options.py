"""Which ways are there to run a recipe on a cluster, which fit, and which of these is fastest?

The step is exact at any chunk size, so "does it fit?" asks only whether the activations of one
image fit beside weights, gradients and what heads and loss need of the whole rank batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mocov3_ds.config.compression import OFF
from mocov3_ds.distributed.engine_config import REDUCE_BUCKET
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks, choose_chunks, choose_key_block
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.optim.build import read_block
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.planning.architecture import measure_other, rows_know_each_other
from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.memory import Memory, plan_memory
from mocov3_ds.planning.pace import Pace, plan_pace
from mocov3_ds.planning.step_setup import PERSISTENCE, OptimizerParams, Precision, StepSetup
from mocov3_ds.planning.whole_matrices import matrix_params

STAGES = (0, 1, 2, 3)
_STAGE_ORDER = {1: 0, 2: 1, 0: 2, 3: 3}
"""which stage comes first at the same speed"""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What is to be trained, and with which DeepSpeed JSON."""

    recipe: str
    shape: EncoderShape
    """architecture of the base encoder"""
    batch: int
    """images of a step, all cards together"""
    epochs: float
    engine: dict[str, Any]
    """DeepSpeed JSON, with its optimizer block"""
    tf32: bool = False
    """whether products of an fp32 run may round their inputs to TF32"""
    compress: str = OFF
    """schedule of the sequences' length, see `--compress`"""

    @property
    def precision(self) -> Precision:
        """fp32, tf32, bf16 or fp16."""
        names: tuple[Precision, ...] = ("bf16", "fp16")
        for name in names:
            if (self.engine.get(name) or {}).get("enabled"):
                return name
        return "tf32" if self.tf32 else "fp32"

    @property
    def optimizer(self) -> type[ShardedOptimizer]:
        """Class of the optimizer block."""
        return read_block(self.engine["optimizer"])[0]

    @property
    def optimizer_params(self) -> OptimizerParams:
        """Params of the optimizer block on which the work of a step depends."""
        return matrix_params(read_block(self.engine["optimizer"])[1])

    def lay_out(self, cards: int, stage: int, *, recompute_blocks: bool) -> StepSetup:
        """One step on so many cards, each view in one pass.

        Args:
            cards: number of cards, and so of ranks.
            stage: stage of ZeRO, 0 to 3.
            recompute_blocks: whether the backward computes each block a second time.
        """
        return StepSetup(
            shape=self.shape,
            stage=stage,
            world_size=cards,
            batch=self.batch,
            precision=self.precision,
            chunks=Chunks(),
            recompute_blocks=recompute_blocks,
            key_block=choose_key_block(self.batch // cards, self.batch),
            optimizer=self.optimizer,
            optimizer_params=self.optimizer_params,
            compress=self.compress,
            persistence=self._zero_number("stage3_param_persistence_threshold", PERSISTENCE),
            bucket=self._zero_number("reduce_bucket_size", REDUCE_BUCKET),
        )

    def _zero_number(self, key: str, default: int) -> int:
        zero = self.engine.get("zero_optimization") or {}
        return int(check_number(f"zero_optimization.{key}", zero.get(key, default), 0))


@dataclass(frozen=True)
class Option:
    """One way to run it, with the largest chunks that fit."""

    setup: StepSetup
    memory: Memory
    pace: Pace | None
    """None where it does not fit"""
    why: str = ""
    """why it is, or is not, to be chosen; a clause for the table of options"""

    @property
    def fits(self) -> bool:
        """Whether it runs at all."""
        return self.pace is not None

    @property
    def passes(self) -> str:
        """How a rank's images go through the backbone, as text."""
        if not self.fits:
            return "-"
        chunks = self.setup.chunks
        blocks = ", blocks recomputed" * self.setup.recompute_blocks
        if not chunks.size:
            return f"one pass{blocks}"
        return f"chunks of {chunks.size}{f', {chunks.keep} kept' * bool(chunks.keep)}{blocks}"


def rank_options(
    planned: PlannedRun, cluster: Cluster, stages: tuple[int, ...] = STAGES
) -> list[Option]:
    """Every stage with and without recomputed blocks: what fits first, and of that the fastest.

    Raises:
        ValueError: the batch does not divide over the cards, or card or stages do not have the
            precision.
    """
    _check_run(planned, cluster)
    options = [_best_chunks(setup, cluster) for setup in list_setups(planned, cluster, stages)]
    if not options:
        raise ValueError(
            "fp16 has no stage 0 (DeepSpeed computes it wrongly); choose --stage 1, 2 or 3."
        )
    options.sort(key=_rank)
    return [replace(option, why=_explain(option, options[0], cluster)) for option in options]


def _rank(option: Option) -> tuple[bool, float, bool, int]:
    setup = option.setup
    measure = option.pace.mean_step_s if option.pace else option.memory.peak_bytes
    order = _STAGE_ORDER[setup.stage]
    return (not option.fits, round(measure, 3), setup.recompute_blocks, order)


def list_setups(
    planned: PlannedRun, cluster: Cluster, stages: tuple[int, ...]
) -> Iterator[StepSetup]:
    """Each stage with and without recomputed blocks, but stage 0 in fp16, which DeepSpeed lacks.

    What recomputation saves is known of the paper's Vision Transformers alone.
    """
    has_formulas = measure_other(planned.shape) is None
    for stage in stages:
        if not (stage == 0 and planned.precision == "fp16"):
            for recompute in (False, True) if has_formulas else (False,):
                setup = planned.lay_out(cluster.cards, stage, recompute_blocks=recompute)
                yield replace(setup, device=cluster.card.device)


def _check_run(planned: PlannedRun, cluster: Cluster) -> None:
    ranks = cluster.cards
    if planned.batch % ranks:
        near = planned.batch // ranks * ranks
        fits = f"{near} or {near + ranks}" if near else str(ranks)
        raise ValueError(
            f"the global batch {planned.batch} does not divide over {ranks} cards; choose --batch "
            f"{fits}, or another number of cards."
        )
    if planned.tf32 and not (planned.precision == "tf32" and cluster.card.tf32_rate):
        raise ValueError(
            f"--tf32 would have no effect in {planned.precision} on {cluster.card.name}: it is for "
            "products in fp32 on cards that have TF32."
        )
    if planned.precision == "bf16" and not cluster.card.bf16:
        raise ValueError(
            f"{cluster.card.name} has no bf16; plan with --deepspeed_config "
            "ds_configs/zero1_adamw_fp16.json."
        )


def _best_chunks(setup: StepSetup, cluster: Cluster) -> Option:
    room = fitting_images(setup, cluster)
    if rows_know_each_other(setup.shape):
        chunks = Chunks()
    else:
        chunks = choose_chunks(room, setup.images) if room else Chunks(size=1)
    setup = replace(setup, chunks=chunks)
    pace = plan_pace(setup, cluster) if room else None
    return Option(setup, plan_memory(setup), pace)


def fitting_images(setup: StepSetup, cluster: Cluster) -> int:
    """Images whose activations fit at once, counting both views; at most twice the rank's batch.

    The largest for which the chunks that a run would choose stay within the card, found by halving:
    memory grows with it. 0 where not even one image fits, or not the whole batch of a backbone
    whose rows know each other.
    """

    def fits(room: int) -> bool:
        chunks = choose_chunks(room, setup.images)
        return plan_memory(replace(setup, chunks=chunks)).peak_bytes <= cluster.usable_bytes

    if fits(2 * setup.images):
        return 2 * setup.images
    if rows_know_each_other(setup.shape):
        return 0
    low, high = 0, 2 * setup.images
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _explain(option: Option, best: Option, cluster: Cluster) -> str:
    needed, usable = option.memory.peak_bytes / GIB, cluster.usable_bytes / GIB
    if option.pace is None and rows_know_each_other(option.setup.shape):
        return (
            f"does not fit: batch norm in the backbone takes the {option.setup.images} images of a "
            f"rank in one pass, which needs {needed:.1f} of {usable:.1f} GiB"
        )
    if option.pace is None:
        return f"does not fit: an image at a time needs {needed:.1f} of {usable:.1f} GiB"
    if option is best:
        return "the fastest that fits"
    assert best.pace is not None
    stage, many_cards = option.setup.stage, cluster.cards > 1
    reasons = []
    if stage == 3 and many_cards:
        gathered = sum(
            collective.payload
            for collective, _ in option.pace.collectives
            if collective.purpose == "weights of each pass"
        )
        reasons.append(f"gathers up to {gathered / 1e9:.1f} GB of weights a step")
    if stage == 2 and best.setup.stage == 1:
        reasons.append("holds what stage 1 holds: the whole gradient lives until the last chunk")
    if stage == 0 and many_cards:
        reasons.append("optimizer state whole on each card")
    if option.setup.recompute_blocks:
        reasons.append("computes each block twice")
    slower = option.pace.mean_step_s / best.pace.mean_step_s - 1
    if slower >= 5e-4:
        reasons.append(f"{100 * slower:.1f} % slower")
    return "; ".join(reasons) or "the same speed"
