"""The kernels written plainly: whole segments, fresh temporaries, any device.

The other kernels are tested against these, and an optimizer without kernels of its own measures
with `add_sums` and `square_sum`.
"""

import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Segment
from mocov3_ds.optim.kernel_types import EVERYTHING, AdamTerms, FlatStep, Quantity


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares of all elements, as a tensor without dimensions."""
    return x.square().sum()  # pairwise; `x.norm()` is off by 4e-5 on 2 M elements on a CPU


def add_sums(sums_QS: Tensor, row: int, w: Tensor, g: Tensor, m: Tensor | None) -> None:
    """Add a segment's sums to its tensor's row, before anything is updated.

    The direction's sum of squares (`Quantity.UPDATE`) is left to the caller, and so are the rows of
    g / sqrt(v).

    Args:
        sums_QS: The sums so far, (Q, S), which are changed.
        row: Row of the segment's tensor among the S.
        w: Weights of the segment, one-dimensional.
        g: Gradient of the segment, one-dimensional.
        m: Momentum of the segment before the step; None where the optimizer has none.
    """
    sums_QS[Quantity.WEIGHT, row] += square_sum(w)
    sums_QS[Quantity.GRADIENT, row] += square_sum(g)
    if len(sums_QS) < EVERYTHING:
        return
    sums_QS[Quantity.PEAK, row] = torch.maximum(sums_QS[Quantity.PEAK, row], g.abs().max())
    if m is not None:
        sums_QS[Quantity.PRODUCT, row] += (g * m).sum()
        sums_QS[Quantity.MOMENTUM, row] += square_sum(m)


def update_moments(g: Tensor, m: Tensor, v: Tensor, terms: AdamTerms) -> None:
    """Move the first and second moment of Adam towards the gradient and its square."""
    m.mul_(terms.beta1).add_(g, alpha=terms.gain)
    v.mul_(terms.beta2).addcmul_(g, g, value=1 - terms.beta2)


def adam_direction(w: Tensor, m: Tensor, v: Tensor, terms: AdamTerms, decay: float) -> Tensor:
    """Direction m̂ / (√v̂ + eps) + weight_decay decay w of a segment."""
    u = (m / terms.bias1) / ((v / terms.bias2).sqrt() + terms.eps)
    return u + (terms.weight_decay * decay) * w


def update_adam(flat: FlatStep, sums_QS: Tensor, rate_S: Tensor | None) -> None:
    """See `Kernels.update_adam`."""
    share, terms = flat.share, AdamTerms(flat.group, flat.number)
    for segment in share.flat.segments:
        row = share.row(segment)
        w_, g_, m_, v_ = (segment.of(x) for x in flat.tensors)
        add_sums(sums_QS, row, w_, g_, m_)
        if len(sums_QS) > Quantity.BEFORE:
            sums_QS[Quantity.BEFORE, row] += square_sum(g_ / _root(v_, terms.bias2_before, terms))
        update_moments(g_, m_, v_, terms)
        if len(sums_QS) > Quantity.AFTER:
            sums_QS[Quantity.AFTER, row] += square_sum(g_ / _root(v_, terms.bias2, terms))
        g_.copy_(adam_direction(w_, m_, v_, terms, share.decay(segment)))
        sums_QS[Quantity.UPDATE, row] += square_sum(g_)
    if rate_S is not None:
        move_weights(flat, rate_S)


def _root(v: Tensor, bias2: float, terms: AdamTerms) -> Tensor:
    return (v / bias2).sqrt().clamp_min(terms.floor)


def move_weights(flat: FlatStep, rate_S: Tensor) -> None:
    """See `Kernels.move_weights`."""
    for segment in flat.share.flat.segments:
        rate = rate_S[flat.share.row(segment)]
        segment.of(flat.weight).addcmul_(segment.of(flat.gradient), rate, value=-1)


def measure_lars(flat: FlatStep, sums_QS: Tensor) -> None:
    """See `Kernels.measure_lars`."""
    for segment in flat.share.flat.segments:
        row = flat.share.row(segment)
        w_, g_, m_ = (segment.of(x) for x in flat.tensors)
        add_sums(sums_QS, row, w_, g_, m_)
        sums_QS[Quantity.UPDATE, row] += square_sum(_lars_direction(flat, segment))


def move_lars(flat: FlatStep, ratio_S: Tensor, rate_S: Tensor) -> None:
    """See `Kernels.move_lars`."""
    momentum, nesterov = flat.group["momentum"], flat.group["nesterov"]
    for segment in flat.share.flat.segments:
        row, (w_, _, m_) = flat.share.row(segment), (segment.of(x) for x in flat.tensors)
        d_ = _lars_direction(flat, segment) * ratio_S[row]
        m_.mul_(momentum).add_(d_)
        w_.sub_(rate_S[row] * (d_ + momentum * m_ if nesterov else m_))


def _lars_direction(flat: FlatStep, segment: Segment) -> Tensor:
    decay = flat.group["weight_decay"] * flat.share.decay(segment)
    return segment.of(flat.gradient) + decay * segment.of(flat.weight)
