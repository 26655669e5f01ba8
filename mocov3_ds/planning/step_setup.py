"""How is one step laid out: which model, over how many ranks, with which ZeRO stage and chunks?

Memory, traffic and time of a step are all computed from this one description.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mocov3_ds.config.compression import OFF
from mocov3_ds.distributed.engine_config import REDUCE_BUCKET
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.chunking import Chunks, count_kept_chunks
from mocov3_ds.optim.adamw import AdamW
from mocov3_ds.optim.sharded import ShardedOptimizer

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""of weights and activations; tf32 is fp32 whose matrix products round their inputs (`--tf32`)"""
_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OptimizerParams = tuple[tuple[str, Any], ...]
"""some params of an optimizer block: key and value, which can be hashed"""
PERSISTENCE = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`"""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a rank goes through the backbone in a step, both views together."""

    forward: int
    """passes with gradients, of one chunk each"""
    recomputed: int
    """passes that the backward repeats since nothing was kept of them"""


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """One training step as the planner sees it; all ranks do the same."""

    shape: EncoderShape
    """architecture of the base encoder"""
    stage: int
    """stage of ZeRO, 0 to 3"""
    world_size: int
    """number of ranks, one a card"""
    batch: int
    """images of all ranks together"""
    precision: Precision
    """of weights, activations and gradients; masters and optimizer state are fp32"""
    chunks: Chunks
    """how a rank's images go through the backbone"""
    recompute_blocks: bool = False
    """whether the backward computes each block a second time instead of keeping its activations"""
    key_block: int = 0
    """keys for which logits exist at once; 0 = all"""
    optimizer: type[ShardedOptimizer] = AdamW
    """tells how many state tensors stand beside each weight, and what an update moves"""
    optimizer_params: OptimizerParams = ()
    """those of its params on which the work of a step depends, see `whole_matrices`"""
    persistence: int = PERSISTENCE
    """`stage3_param_persistence_threshold`: numbers of the largest tensor that stays whole"""
    compress: str = OFF
    """schedule of the sequences' length, see `--compress`; memory is that of the longest"""
    device: Literal["cuda", "cpu"] = "cuda"
    """what the ranks compute on"""
    bucket: int = REDUCE_BUCKET
    """`reduce_bucket_size`: numbers of the gradient that are reduced at once"""

    @property
    def images(self) -> int:
        """Images of one rank."""
        return self.batch // self.world_size

    @property
    def number_bytes(self) -> int:
        """Bytes of one number of the network: 4 in fp32, else 2."""
        return 4 if self.dtype == "float32" else 2

    @property
    def dtype(self) -> str:
        """The precision by torch's name."""
        return _DTYPES[self.precision]

    @property
    def passes(self) -> Passes:
        """Passes of a rank through its backbone."""
        chunk = self.chunks.size
        if not chunk or chunk >= self.images:
            return Passes(forward=2, recomputed=2 * self.recompute_blocks)
        forward = 2 * -(-self.images // chunk)
        repeated = forward - sum(count_kept_chunks(self.chunks, self.images))
        return Passes(forward=forward, recomputed=repeated + forward * self.recompute_blocks)
