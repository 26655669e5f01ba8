"""The two passes over a flat tensor: one measures and finds directions, one moves the weights.

Between them lies one all-reduce of three sums per tensor, which makes the norms. Each path below
gives the same results up to the order of summation:

    plain     whole segments and fresh temporaries, any device; what the others are tested against
    blocks    CPU: blocks that stay in the cache, with torch's own fused Adam arithmetic
    triton    CUDA: one launch a pass over all segments of a flat, `triton_kernels`

Bytes per fp32 element on this rank, with w, g, m, v = weight, gradient, first and second moment and
the direction u kept in the gradient's place:

    LAMB    pass 1 reads w g m v, writes m v u; pass 2 reads w u, writes w         40 = the floor
    LARS    pass 1 reads w g; pass 2 reads w g m, writes w m                       28 = the floor
    AdamW   one pass, since nothing must be known beforehand: reads w g m v,
            writes w m v                                                           28 = the floor

A floor is what must move if each value is read once a pass and nothing is recomputed. LAMB cannot
be done in one pass: no weight may move before the norms of the whole tensor are known, and a shard
does not fit in a cache. (Recomputing u from m and v in pass 2 moves 40 bytes, too.) `blocks` moves
the same bytes to and from memory as `triton`; `plain` moves more than twice as much. No path writes
a low-precision copy: DeepSpeed's wrappers make theirs from the fp32 weights after the step in any
case, and a second one would be bytes for nothing.

A path looks at how many rows `sums_QS` has: 3 are always needed, the RMS of g / sqrt(v) is the
fourth, and with all 8 rows the moments before the step are measured, too. All of it is arithmetic
on values that the pass has read in any case (LARS alone reads m in pass 1 as well, 4 bytes more).

Legend: S = tensors that one call of `step` updates; Q = quantities measured, see `plan`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocov3_ds.optim.step_tables import (
    AFTER,
    BEFORE,
    EVERYTHING,
    GRADIENT,
    MOMENTUM,
    PEAK,
    PRODUCT,
    UPDATE,
    WEIGHT,
    Share,
)

BACKENDS = ("auto", "plain", "blocks", "triton")
_FLOOR = 1e-15  # of sqrt(v) where eps is 0
_ROW = 4096
_BLOCK = 2**17  # elements a thread: five arrays of half a MiB stay in a core's part of the caches


@dataclass(frozen=True)
class AdamTerms:
    """Scalars of one step of LAMB's or AdamW's direction m̂ / (√v̂ + eps) + weight_decay w.

    Attributes:
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        grad_averaging: whether the gradient enters the first moment times 1 - beta1, or whole.
        eps: added to the root of the second moment.
        weight_decay: times the decay of a tensor's rule.
        step: steps done including this one, from 1.
        bias_correction: whether moments are corrected for starting at 0.
    """

    beta1: float
    beta2: float
    grad_averaging: bool
    eps: float
    weight_decay: float
    step: int
    bias_correction: bool

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> "AdamTerms":
        """Those of a parameter group; one without `grad_averaging` (AdamW's) always averages."""
        return cls(
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            grad_averaging=group.get("grad_averaging", True),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            bias_correction=group["bias_correction"],
        )

    @property
    def gain(self) -> float:
        """Weight of the gradient in the first moment."""
        return 1 - self.beta1 if self.grad_averaging else 1.0

    @property
    def bias1(self) -> float:
        """Divisor of the first moment."""
        return 1 - self.beta1**self.step if self.bias_correction else 1.0

    @property
    def bias2(self) -> float:
        """Divisor of the second moment."""
        return 1 - self.beta2**self.step if self.bias_correction else 1.0

    @property
    def bias2_before(self) -> float:
        """Divisor of the second moment before this step; 1 before the first, where it is 0."""
        before = 1 - self.beta2 ** (self.step - 1) if self.bias_correction else 1.0
        return before or 1.0

    @property
    def floor(self) -> float:
        """Smallest root of the second moment that a gradient is divided by, when measuring."""
        return max(self.eps, _FLOOR)


@dataclass(frozen=True)
class LarsTerms:
    """Scalars of one step of LARS."""

    momentum: float
    weight_decay: float
    nesterov: bool


Adam = Callable[
    [Share, Tensor, Tensor, Tensor, Tensor, AdamTerms, Tensor, Tensor | None],
    None,
]
Move = Callable[[Share, Tensor, Tensor, Tensor], None]
LarsNorms = Callable[[Share, Tensor, Tensor, Tensor, LarsTerms, Tensor], None]
LarsMove = Callable[[Share, Tensor, Tensor, Tensor, LarsTerms, Tensor, Tensor], None]


class Kernels(NamedTuple):
    """One path. All tensors are one-dimensional fp32 flats; rows of S follow `Share.row`.

    Attributes:
        adam: (share, w, g, m, v, terms, sums_QS, rate_S) updates m and v, adds to `sums_QS`, and
            either leaves the direction in g (`rate_S` None) or moves w by `rate_S` at once, after
            which g is undefined.
        move: (share, w, u, rate_S) does w <- w - rate u.
        lars_norms: (share, w, g, m, terms, sums_QS) adds to them; the direction is g + decay w.
        lars_move: (share, w, g, m, terms, ratio_S, rate_S) does m <- momentum m + ratio direction
            and w <- w - rate m (with `nesterov`: rate times ratio direction + momentum m).
    """

    adam: Adam
    move: Move
    lars_norms: LarsNorms
    lars_move: LarsMove


def kernels_for(backend: str, device: torch.device) -> Kernels:
    """The path that `backend` names, or the fastest for the device with "auto".

    Raises:
        ValueError: an unknown backend, or one that does not run on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if backend == "blocks" and device.type != "cpu":
        raise ValueError(f"backend 'blocks' is for the CPU, the weights are on {device}; use auto.")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        try:
            from mocov3_ds.optim import triton_kernels
        except ImportError:
            if backend == "auto":
                return PLAIN
            raise ValueError("backend 'triton' needs the triton package; use auto.") from None
        triton_kernels.check(device)
        return triton_kernels.TRITON
    return BLOCKS if device.type == "cpu" and backend != "plain" else PLAIN


def _square_sum(x: Tensor) -> Tensor:
    return x.square().sum()  # pairwise; `x.norm()` is off by 4e-5 on 2 M elements on a CPU


def _plain_adam(
    share: Share,
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    terms: AdamTerms,
    sums_QS: Tensor,
    rate_S: Tensor | None,
) -> None:
    for segment in share.flat.segments:
        row = share.row(segment)
        w_, g_, m_, v_ = (segment.of(x) for x in (w, g, m, v))
        sums_QS[WEIGHT, row] += _square_sum(w_)
        sums_QS[GRADIENT, row] += _square_sum(g_)
        if len(sums_QS) == EVERYTHING:
            sums_QS[BEFORE, row] += _square_sum(g_ / _root(v_, terms.bias2_before, terms))
            _plain_watch(g_, m_, sums_QS, row)
        _update_moments(g_, m_, v_, terms)
        if len(sums_QS) > AFTER:
            sums_QS[AFTER, row] += _square_sum(g_ / _root(v_, terms.bias2, terms))
        g_.copy_(_direction(w_, m_, v_, terms, share.decay(segment)))
        sums_QS[UPDATE, row] += _square_sum(g_)
    if rate_S is not None:
        _plain_move(share, w, g, rate_S)


def _root(v: Tensor, bias2: float, terms: AdamTerms) -> Tensor:
    return (v / bias2).sqrt().clamp_min(terms.floor)


def _plain_watch(g: Tensor, m: Tensor, sums_QS: Tensor, row: int) -> None:
    sums_QS[PRODUCT, row] += (g * m).sum()
    sums_QS[MOMENTUM, row] += _square_sum(m)
    sums_QS[PEAK, row] = torch.maximum(sums_QS[PEAK, row], g.abs().max())


def _update_moments(g: Tensor, m: Tensor, v: Tensor, terms: AdamTerms) -> None:
    m.mul_(terms.beta1).add_(g, alpha=terms.gain)
    v.mul_(terms.beta2).addcmul_(g, g, value=1 - terms.beta2)


def _direction(w: Tensor, m: Tensor, v: Tensor, terms: AdamTerms, decay: float) -> Tensor:
    u = (m / terms.bias1) / ((v / terms.bias2).sqrt() + terms.eps)
    return u + (terms.weight_decay * decay) * w


def _plain_move(share: Share, w: Tensor, u: Tensor, rate_S: Tensor) -> None:
    for segment in share.flat.segments:
        segment.of(w).addcmul_(segment.of(u), rate_S[share.row(segment)], value=-1)


def _plain_lars_norms(
    share: Share, w: Tensor, g: Tensor, m: Tensor, terms: LarsTerms, sums_QS: Tensor
) -> None:
    for segment in share.flat.segments:
        row, w_, g_ = share.row(segment), segment.of(w), segment.of(g)
        sums_QS[WEIGHT, row] += _square_sum(w_)
        sums_QS[GRADIENT, row] += _square_sum(g_)
        sums_QS[UPDATE, row] += _square_sum(g_ + terms.weight_decay * share.decay(segment) * w_)
        if len(sums_QS) == EVERYTHING:
            _plain_watch(g_, segment.of(m), sums_QS, row)


def _plain_lars_move(
    share: Share,
    w: Tensor,
    g: Tensor,
    m: Tensor,
    terms: LarsTerms,
    ratio_S: Tensor,
    rate_S: Tensor,
) -> None:
    for segment in share.flat.segments:
        row, w_, g_, m_ = share.row(segment), segment.of(w), segment.of(g), segment.of(m)
        d_ = (g_ + terms.weight_decay * share.decay(segment) * w_) * ratio_S[row]
        m_.mul_(terms.momentum).add_(d_)
        w_.sub_(rate_S[row] * (d_ + terms.momentum * m_ if terms.nesterov else m_))


PLAIN = Kernels(_plain_adam, _plain_move, _plain_lars_norms, _plain_lars_move)


def _blocks(offset: int, length: int) -> Iterator[slice]:
    size = _BLOCK * torch.get_num_threads()
    for start in range(offset, offset + length, size):
        yield slice(start, min(start + size, offset + length))


def _row_square_sum(x: Tensor) -> float:
    """Square sum, exact as a pairwise one and fast as `norm`: the norm of short rows' norms."""
    head = len(x) // _ROW * _ROW
    row_norms = torch.linalg.vector_norm(x[:head].view(-1, _ROW), dim=1)
    total = float(torch.linalg.vector_norm(row_norms)) ** 2
    return total + float(torch.linalg.vector_norm(x[head:])) ** 2 if head < len(x) else total


def _block_adam(
    share: Share,
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    terms: AdamTerms,
    sums_QS: Tensor,
    rate_S: Tensor | None,
) -> None:
    scratch = torch.empty(min(_BLOCK * torch.get_num_threads(), w.numel()))
    more = torch.empty_like(scratch) if rate_S is None and len(sums_QS) > AFTER else scratch
    step = torch.tensor(float(terms.step) if terms.bias_correction else math.inf)
    for segment in share.flat.segments:
        row, sums = share.row(segment), [0.0] * len(sums_QS)
        decay = terms.weight_decay * share.decay(segment)
        for block in _blocks(segment.offset, segment.length):
            w_, g_, m_, v_ = w[block], g[block], m[block], v[block]
            sums[WEIGHT] += _row_square_sum(w_)
            sums[GRADIENT] += _row_square_sum(g_)
            if len(sums) == EVERYTHING:
                out = scratch[: len(w_)]
                sums[BEFORE] += _relative_square_sum(g_, v_, terms.bias2_before, terms, out)
                _block_watch(g_, m_, sums)
            u_ = torch.mul(w_, decay, out=scratch[: len(w_)]) if decay else None
            u_ = scratch[: len(w_)].zero_() if u_ is None else u_
            _add_adam_direction(u_, g_, m_, v_, step, terms)
            sums[UPDATE] += _row_square_sum(u_)
            if rate_S is not None:
                w_.add_(u_, alpha=-float(rate_S[row]))
            if len(sums) > AFTER:
                out = u_ if rate_S is not None else more[: len(w_)]
                sums[AFTER] += _relative_square_sum(g_, v_, terms.bias2, terms, out)
            if rate_S is None:
                g_.copy_(u_)
        sums_QS[:, row] += torch.tensor(sums)


def _relative_square_sum(
    g: Tensor, v: Tensor, bias2: float, terms: AdamTerms, out: Tensor
) -> float:
    """Sum of (g / max(sqrt(v / bias2), floor))^2; `out` is scratch of the same length."""
    torch.clamp_min(v, bias2 * terms.floor**2, out=out)
    return bias2 * _row_square_sum(out.rsqrt_().mul_(g))


def _block_watch(g: Tensor, m: Tensor, sums: list[float]) -> None:
    sums[PRODUCT] += float(torch.dot(g, m))
    sums[MOMENTUM] += _row_square_sum(m)
    low, high = torch.aminmax(g)
    sums[PEAK] = max(sums[PEAK], -float(low), float(high))


def _add_adam_direction(
    u: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, terms: AdamTerms
) -> None:
    """Update m and v, and do u <- u + m̂ / (√v̂ + eps)."""
    if not terms.grad_averaging:  # torch's arithmetic does not know it
        _update_moments(g, m, v, terms)
        u.add_(_direction(u, m, v, terms, decay=0.0))
        return
    torch._fused_adam_(  # what torch.optim.Adam(fused=True) calls: w <- w - lr direction
        [u],
        [g],
        [m],
        [v],
        [],
        [step],
        lr=-1.0,
        beta1=terms.beta1,
        beta2=terms.beta2,
        weight_decay=0.0,
        eps=terms.eps,
        amsgrad=False,
        maximize=False,
    )


def _block_move(share: Share, w: Tensor, u: Tensor, rate_S: Tensor) -> None:
    for segment in share.flat.segments:
        segment.of(w).add_(segment.of(u), alpha=-float(rate_S[share.row(segment)]))


def _block_lars_norms(
    share: Share, w: Tensor, g: Tensor, m: Tensor, terms: LarsTerms, sums_QS: Tensor
) -> None:
    scratch = torch.empty(min(_BLOCK * torch.get_num_threads(), w.numel()))
    for segment in share.flat.segments:
        row, sums = share.row(segment), [0.0] * len(sums_QS)
        decay = terms.weight_decay * share.decay(segment)
        for block in _blocks(segment.offset, segment.length):
            w_, g_ = w[block], g[block]
            sums[WEIGHT] += _row_square_sum(w_)
            sums[GRADIENT] += _row_square_sum(g_)
            sums[UPDATE] += _row_square_sum(torch.add(g_, w_, alpha=decay, out=scratch[: len(w_)]))
            if len(sums) == EVERYTHING:
                _block_watch(g_, m[block], sums)
        sums_QS[:, row] += torch.tensor(sums)


def _block_lars_move(
    share: Share,
    w: Tensor,
    g: Tensor,
    m: Tensor,
    terms: LarsTerms,
    ratio_S: Tensor,
    rate_S: Tensor,
) -> None:
    for segment in share.flat.segments:
        row = share.row(segment)
        ratio, rate = float(ratio_S[row]), float(rate_S[row])
        decay = terms.weight_decay * share.decay(segment)
        for block in _blocks(segment.offset, segment.length):
            w_, g_, m_ = w[block], g[block], m[block]
            if decay:
                g_.add_(w_, alpha=decay)
            m_.mul_(terms.momentum).add_(g_, alpha=ratio)
            if terms.nesterov:
                w_.add_(g_, alpha=-rate * ratio).add_(m_, alpha=-rate * terms.momentum)
            else:
                w_.add_(m_, alpha=-rate)


BLOCKS = Kernels(_block_adam, _block_move, _block_lars_norms, _block_lars_move)
