"""The kernels for a CPU: blocks that stay in the caches, with torch's own fused Adam arithmetic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Segment
from mocov3_ds.optim.kernel_types import EVERYTHING, AdamTerms, FlatStep, Quantity
from mocov3_ds.optim.plain_kernels import adam_direction, update_moments


@dataclass(frozen=True)
class BlockKernels:
    """The passes over a flat tensor, block after block of each segment.

    Attributes:
        block: Elements of a block for each thread. By default the five arrays of a block take half
            a MiB each, which stays in a core's share of the caches.
        row: Elements whose squares are summed at once.
    """

    block: int = 2**17
    row: int = 4096

    def update_adam(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor | None) -> None:
        """See `Kernels.update_adam`."""
        share, terms = flat.share, AdamTerms(flat.group, flat.number)
        scratch = self._allocate_scratch(flat.weight)
        # the RMS after the update needs scratch of its own where the direction is kept
        needs_both = rate_S is None and len(sums_QS) > Quantity.AFTER
        second = torch.empty_like(scratch) if needs_both else scratch
        step = torch.tensor(float(terms.step) if terms.bias_correction else math.inf)
        for segment in share.flat.segments:
            row, sums = share.row(segment), [0.0] * len(sums_QS)
            decay = terms.weight_decay * share.decay(segment)
            for block in self._blocks(segment):
                w_, g_, m_, v_ = (x[block] for x in flat.tensors)
                self._add_sums(sums, w_, g_, m_)
                u_ = scratch[: len(w_)]
                if len(sums) > Quantity.BEFORE:
                    sums[Quantity.BEFORE] += self._relative_square_sum(
                        g_, v_, terms.bias2_before, terms, u_
                    )
                u_ = torch.mul(w_, decay, out=u_) if decay else u_.zero_()
                _add_adam_direction(u_, g_, m_, v_, step, terms)
                sums[Quantity.UPDATE] += self.square_sum(u_)
                if rate_S is not None:
                    w_.add_(u_, alpha=-float(rate_S[row]))
                if len(sums) > Quantity.AFTER:
                    out = second[: len(w_)]
                    sums[Quantity.AFTER] += self._relative_square_sum(
                        g_, v_, terms.bias2, terms, out
                    )
                if rate_S is None:
                    g_.copy_(u_)
            sums_QS[:, row] += torch.tensor(sums)

    def move_weights(self, flat: FlatStep, rate_S: Tensor) -> None:
        """See `Kernels.move_weights`."""
        for segment in flat.share.flat.segments:
            rate = float(rate_S[flat.share.row(segment)])
            segment.of(flat.weight).add_(segment.of(flat.gradient), alpha=-rate)

    def measure_lars(self, flat: FlatStep, sums_QS: Tensor) -> None:
        """See `Kernels.measure_lars`."""
        share, scratch = flat.share, self._allocate_scratch(flat.weight)
        for segment in share.flat.segments:
            row, sums = share.row(segment), [0.0] * len(sums_QS)
            decay = flat.group["weight_decay"] * share.decay(segment)
            for block in self._blocks(segment):
                w_, g_, m_ = (x[block] for x in flat.tensors)
                self._add_sums(sums, w_, g_, m_)
                u_ = torch.add(g_, w_, alpha=decay, out=scratch[: len(w_)])
                sums[Quantity.UPDATE] += self.square_sum(u_)
            sums_QS[:, row] += torch.tensor(sums)

    def move_lars(self, flat: FlatStep, ratio_S: Tensor, rate_S: Tensor) -> None:
        """See `Kernels.move_lars`."""
        share, momentum = flat.share, flat.group["momentum"]
        for segment in share.flat.segments:
            row = share.row(segment)
            ratio, rate = float(ratio_S[row]), float(rate_S[row])
            decay = flat.group["weight_decay"] * share.decay(segment)
            for block in self._blocks(segment):
                w_, g_, m_ = (x[block] for x in flat.tensors)
                if decay:
                    g_.add_(w_, alpha=decay)
                m_.mul_(momentum).add_(g_, alpha=ratio)
                if flat.group["nesterov"]:
                    w_.add_(g_, alpha=-rate * ratio).add_(m_, alpha=-rate * momentum)
                else:
                    w_.add_(m_, alpha=-rate)

    def square_sum(self, x: Tensor) -> float:
        """Square sum, exact as a pairwise one and fast as `norm`: the norm of short rows' norms."""
        head = len(x) // self.row * self.row
        row_norms = torch.linalg.vector_norm(x[:head].view(-1, self.row), dim=1)
        total = float(torch.linalg.vector_norm(row_norms)) ** 2
        return total + float(torch.linalg.vector_norm(x[head:])) ** 2 if head < len(x) else total

    def _blocks(self, segment: Segment) -> Iterator[slice]:
        size, end = self.block * torch.get_num_threads(), segment.offset + segment.length
        for start in range(segment.offset, end, size):
            yield slice(start, min(start + size, end))

    def _allocate_scratch(self, w: Tensor) -> Tensor:
        return torch.empty(min(self.block * torch.get_num_threads(), w.numel()))

    def _add_sums(self, sums: list[float], w: Tensor, g: Tensor, m: Tensor) -> None:
        """Add what is measured of a block before anything is updated."""
        sums[Quantity.WEIGHT] += self.square_sum(w)
        sums[Quantity.GRADIENT] += self.square_sum(g)
        if len(sums) == EVERYTHING:
            sums[Quantity.PRODUCT] += float(torch.dot(g, m))
            sums[Quantity.MOMENTUM] += self.square_sum(m)
            low, high = torch.aminmax(g)
            sums[Quantity.PEAK] = max(sums[Quantity.PEAK], -float(low), float(high))

    def _relative_square_sum(
        self, g: Tensor, v: Tensor, bias2: float, terms: AdamTerms, out: Tensor
    ) -> float:
        """Sum of (g / max(sqrt(v / bias2), floor))^2; `out` is scratch of the same length."""
        torch.clamp_min(v, bias2 * terms.floor**2, out=out)
        return bias2 * self.square_sum(out.rsqrt_().mul_(g))


def _add_adam_direction(
    u: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, terms: AdamTerms
) -> None:
    """Update m and v, and do u <- u + m̂ / (√v̂ + eps)."""
    if not terms.grad_averaging:  # torch's arithmetic does not know it
        update_moments(g, m, v, terms)
        u.add_(adam_direction(u, m, v, terms, decay=0.0))
        return
    torch._fused_adam_(  # what torch.optim.Adam(fused=True) calls: w <- w - lr direction
        [u], [g], [m], [v], [], [step], amsgrad=False, maximize=False, lr=-1.0,
        beta1=terms.beta1, beta2=terms.beta2, weight_decay=0.0, eps=terms.eps,
    )  # fmt: skip
