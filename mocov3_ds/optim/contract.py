"""What an optimizer has to give to be exact on any sharding, and what it may say of itself."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.optim.kernel_types import NORMS, FlatStep
from mocov3_ds.optim.signals import StepFactors, StepSums
from mocov3_ds.optim.step_tables import StepTables


class OptimizerContract(torch.optim.Optimizer):
    """The part of `sharded.ShardedOptimizer` that its subclasses fill in.

    A subclass must give `moments`, `measure_flat` and `move_flat`, and a constructor whose keywords
    are those of its JSON block (`rule` and `backend` among them). With that it works everywhere:
    steps under each ZeRO stage, signals, checkpoints, the planner, the stability grids. What else
    is particular to it, it says by overriding the class attributes and methods below.
    """

    moments: ClassVar[tuple[str, ...]]
    """names of the state tensors beside weights, each as large as the weight; may be empty"""
    aliases: ClassVar[tuple[str, ...]] = ()
    """further types of a DeepSpeed JSON's optimizer block that mean this optimizer"""
    hints: ClassVar[Mapping[str, str]] = {}
    """keys that users try in vain in such a block -> what to do instead"""
    has_trust_ratio: ClassVar[bool] = False
    """whether a ratio of norms scales the step of each tensor whose rule adapts"""
    measures_rms: ClassVar[bool] = False
    """whether `measure_flat` fills the rows AFTER and BEFORE of the sums"""
    counts_own_updates: ClassVar[bool] = True
    """whether a tensor's step number is that of its own updates; else that of the optimizer's"""
    later_options: ClassVar[tuple[str, ...]] = ()
    """hyper-parameters that state dicts of an earlier version do not have"""
    rule_options: ClassVar[tuple[str, ...]] = ()
    """hyper-parameters that the constructor makes rules of: a state with others is refused"""
    accepts_update_clip: ClassVar[bool] = False
    """whether the update clip can be switched between steps; `update_clip` is a keyword then"""

    @abstractmethod
    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """First pass over one flat: update its state tensors and measure it.

        Nothing may depend on other ranks here. An optimizer that needs to know no norm may move
        the weights at once and do nothing in `move_flat`.

        Args:
            flat: The flat tensor with its gradient, state and hyper-parameters.
            sums_QS: Sums so far, to which each segment's are added (see `plain_kernels.add_sums`).
            rate_S: Learning rate of each tensor.
        """

    def moments_of(self, name: str) -> tuple[str, ...]:
        """Those of `moments` that a tensor has; by default all.

        A flat that is cut over the ranks has all of them even so, as large as itself: DeepSpeed
        finds a tensor's state at the tensor's own place in the flat. What a tensor does not have
        is zeros there, and saved nowhere.

        Args:
            name: Name of a trained tensor.
        """
        return self.moments

    @abstractmethod
    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Second pass over one flat: move its weights.

        Args:
            flat: The flat tensor, as the first pass left it.
            rate_S: Learning rate of each tensor.
            factor_S: Factor of each tensor's step, as `compute_factors` gave it.
        """

    def finish_directions(
        self, tables: StepTables, flats: Sequence[FlatStep], sums_QS: Tensor
    ) -> None:
        """Between the passes: make directions that need whole tensors; by default there are none.

        All ranks call it alike, also one that holds nothing, and may exchange what they hold.

        Args:
            tables: Tables of the step.
            flats: The flats that have a gradient here, as the first pass left them.
            sums_QS: Sums of this rank, to which those of the finished directions are added.
        """

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """Factor of each tensor's step beside the learning rate; by default there is none.

        Args:
            sums: What the first pass measured, over all ranks.
            group: Hyper-parameters, as the constructor gave them.
        """
        adapt_S = sums.tables.adapt_S
        return StepFactors(torch.ones_like(sums.tables.multiplier_S), torch.zeros_like(adapt_S))

    def count_quantities(self, group: Mapping[str, Any]) -> int:
        """Number Q of quantities that the step itself needs: `NORMS` or `NORMS_AND_RMS`."""
        return NORMS

    @classmethod
    def bytes_moved(cls) -> int:
        """Bytes that a step must move for each weight; by default those of a single pass.

        One pass reads weight, gradient and state and writes weight and state, in fp32.
        """
        return 4 * (3 + 2 * len(cls.moments))

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Params of a JSON's optimizer block in this optimizer's own keywords.

        Args:
            params: The block's params; DeepSpeed's or another library's spellings may be in it.

        Raises:
            ValueError: The params contradict each other, or ask for another algorithm.
        """
        return params
