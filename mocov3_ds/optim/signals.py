"""What a step measured of each tensor on the way: sums over all ranks, and the signals they make.

Legend: S = tensors; Q = quantities measured of each, see `kernel_types`; K = keys of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mocov3_ds.optim.kernel_types import EVERYTHING, NORMS, Quantity
from mocov3_ds.optim.step_tables import StepTables

NORM_KEYS = ("grad_norm", "update_norm", "weight_norm", "trust_ratio", "rate", "adapts")
EXTRA_KEYS = ("grad_peak", "rms", "rms_before", "cosine")


@dataclass(frozen=True, eq=False)
class StepSums:
    """What the first pass of one call of `step` measured.

    Attributes:
        tables: Tables of the tensors that the call updates.
        local_QS: Sums over the elements of this rank.
        sums_QS: Sums over the elements of all ranks.
    """

    tables: StepTables
    local_QS: Tensor
    sums_QS: Tensor

    @property
    def norms(self) -> Tensor:
        """Norms of the whole weight, direction and gradient of each tensor, (3, S)."""
        return self.sums_QS[:NORMS].sqrt()

    @property
    def rms(self) -> Tensor:
        """RMS of g / sqrt(v) of each whole tensor, v with this step's gradient in it; (S,)."""
        return (self.sums_QS[Quantity.AFTER] / self.tables.counts_S).sqrt()


@dataclass(frozen=True, eq=False)
class StepFactors:
    """Factor of each tensor's step beside the learning rate.

    Attributes:
        factor_S: Factor on the direction, fp32; 1 where a tensor has none.
        adapts_S: Whether a tensor has a factor of its own; bool.
    """

    factor_S: Tensor
    adapts_S: Tensor


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Everything that one call of `step` found out about its tensors.

    Attributes:
        sums: What the first pass measured.
        factors: Factors that were made of it.
        rate_S: Learning rate of each tensor, fp32.
    """

    sums: StepSums
    factors: StepFactors
    rate_S: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Signals:
    """What the last step measured on the way, per tensor and over all ranks.

    Attributes:
        names: Names of the tensors, in the optimizer's order.
        grad_norm_S: Norm of the gradient that the optimizer was given (after clipping, unscaled).
        update_norm_S: Norm of the direction before learning rate and trust ratio; decay is in it.
        weight_norm_S: Norm of the fp32 weight before the step.
        trust_ratio_S: Factor on the direction; 1 where a tensor does not adapt.
        rate_S: Learning rate that applied to each tensor.
        adapts_S: Whether a tensor has such a factor of its own; bool.
        complete: Whether the tensors below were measured; they are NaN otherwise.
        grad_peak_S: Largest |gradient| of all elements.
        rms_S: RMS of g / max(sqrt(v), eps), v corrected for its start at 0 and with this step's g
            in it, which bounds it by sqrt(1 / (1 - beta2)); NaN without a second moment.
        rms_before_S: The same with v as it was before this step; NaN at the first one.
        cosine_S: Cosine of the gradient and the momentum before this step; NaN where either is 0.
    """

    names: tuple[str, ...]
    grad_norm_S: Tensor
    update_norm_S: Tensor
    weight_norm_S: Tensor
    trust_ratio_S: Tensor
    rate_S: Tensor
    adapts_S: Tensor
    complete: bool
    grad_peak_S: Tensor
    rms_S: Tensor
    rms_before_S: Tensor
    cosine_S: Tensor

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of what was measured, as `table` and `rows` use them."""
        return NORM_KEYS + EXTRA_KEYS * self.complete

    def table(self) -> dict[str, npt.NDArray[np.float32]]:
        """Key -> values (S,) in the order of `names`; the first call waits for the device."""
        return dict(zip(self.keys, self._read_values, strict=True))

    @cached_property
    def _read_values(self) -> npt.NDArray[np.float32]:
        values_KS = torch.stack([getattr(self, f"{key}_S").float() for key in self.keys])
        values: npt.NDArray[np.float32] = values_KS.cpu().numpy()
        return values

    @property
    def whole_grad_norm(self) -> float:
        """Norm of the gradient of all tensors together; read with the table."""
        return float(torch.from_numpy(self.table()["grad_norm"]).norm())

    def rows(self) -> dict[str, dict[str, float]]:
        """Tensor name -> value of each key; read with the table."""
        table = self.table()
        return {
            name: {key: float(values_S[row]) for key, values_S in table.items()}
            for row, name in enumerate(self.names)
        }


def mark_undefined(sums_QS: Tensor, *, measures_rms: bool, is_first: Sequence[bool]) -> Tensor:
    """Replace by NaN what has no meaning, where everything was measured.

    Args:
        sums_QS: Sums over all ranks.
        measures_rms: Whether the optimizer has a second moment, so that g / sqrt(v) exists.
        is_first: Whether each tensor's second moment was still zero before this step.

    Returns:
        A tensor of the same shape; `sums_QS` itself stays as it is.
    """
    if measures_rms and not any(is_first):
        return sums_QS
    marked_QS = sums_QS.clone()
    if not measures_rms:
        marked_QS[Quantity.AFTER : Quantity.BEFORE + 1] = torch.nan
    else:
        marked_QS[Quantity.BEFORE, torch.tensor(is_first, device=sums_QS.device)] = torch.nan
    return marked_QS


def join_signals(records: Sequence[StepRecord], order: Sequence[str]) -> Signals:
    """Put together what the calls of `step` measured that make up one optimizer step.

    Args:
        records: Record of each call; each tensor is in one of them.
        order: Names of all tensors, in the order of the signals.
    """
    names = [name for record in records for name in record.sums.tables.names]
    row_by_name = {name: row for row, name in enumerate(names)}
    ordered = tuple(name for name in order if name in row_by_name)
    rows = [row_by_name[name] for name in ordered]
    is_in_order = rows == list(range(len(names)))  # then no index has to go to the device

    def joined(tensors: list[Tensor]) -> Tensor:
        in_row_order = torch.cat(tensors, dim=-1)
        return in_row_order if is_in_order else in_row_order[..., rows]

    sums_QS = joined([record.sums.sums_QS for record in records])
    weight_S, update_S, grad_S = sums_QS[:NORMS].sqrt()
    complete, nan_S = len(sums_QS) == EVERYTHING, torch.full_like(grad_S, torch.nan)
    extra = {f"{key}_S": nan_S for key in EXTRA_KEYS}
    if complete:
        counts_S = joined([record.sums.tables.counts_S for record in records])
        product_S = sums_QS[Quantity.PRODUCT] / grad_S
        extra = {
            # a maximum over ranks may lose a NaN, a sum does not
            "grad_peak_S": torch.where(grad_S.isnan(), nan_S, sums_QS[Quantity.PEAK]),
            "rms_S": (sums_QS[Quantity.AFTER] / counts_S).sqrt(),
            "rms_before_S": (sums_QS[Quantity.BEFORE] / counts_S).sqrt(),
            "cosine_S": product_S / sums_QS[Quantity.MOMENTUM].sqrt(),
        }
    return Signals(
        names=ordered,
        grad_norm_S=grad_S,
        update_norm_S=update_S,
        weight_norm_S=weight_S,
        trust_ratio_S=joined([record.factors.factor_S for record in records]),
        rate_S=joined([record.rate_S for record in records]),
        adapts_S=joined([record.factors.adapts_S for record in records]),
        complete=complete,
        **extra,
    )
