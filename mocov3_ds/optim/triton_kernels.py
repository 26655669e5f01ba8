# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the two passes: one launch a pass over all segments of a flat tensor.

A flat is cut into blocks of at most `_BLOCK` elements, each inside one segment, so that padding is
never read or written. Pass 1 writes a block's part of each quantity; `_reduce` joins the parts of
each segment in a fixed order, without atomics, so that equal runs are bit-equal. Loads are
vectorised where all offsets and lengths of the flat are multiples of 4 (the usual ViT on any power
of two ranks; an odd size costs speed, not correctness).

Roots and divisions are the correctly rounded ones. With TRITON_INTERPRET=1 in the environment
before triton is imported, the same code runs on the CPU, slowly, for tests.

Legend: N = blocks of a flat, K = its segments here; Q = quantities measured, see `kernel_types`.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mocov3_ds.optim.kernel_types import EVERYTHING, AdamTerms, FlatStep, Quantity
from mocov3_ds.optim.step_tables import Share

_BLOCK = 2048
_REDUCE = 1024


@dataclass(frozen=True)
class _Table:
    """A flat's blocks and segments on the device.

    Attributes:
        offsets_N: First element of each block, int64.
        lengths_N: Number of elements of each block, int32.
        rows_N: Row of each block's tensor among the S of the step, int32.
        decays_N: Multiple of the weight decay of each block, fp32.
        first_K: First block of each segment, int32.
        end_K: Block after the last one of each segment, int32.
        rows_K: Row of each segment's tensor, int32.
        partial_QN: Scratch for what is measured of each block, fp32.
        aligned: Whether each offset and length is a multiple of 4.
    """

    offsets_N: Tensor
    lengths_N: Tensor
    rows_N: Tensor
    decays_N: Tensor
    first_K: Tensor
    end_K: Tensor
    rows_K: Tensor
    partial_QN: Tensor
    aligned: bool

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return len(self.offsets_N)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The blocks as each pass takes them, in the order of its arguments."""
        return self.offsets_N, self.lengths_N, self.rows_N, self.decays_N


_tables: WeakKeyDictionary[Share, _Table] = WeakKeyDictionary()


def _table(share: Share) -> _Table:
    if share not in _tables:
        _tables[share] = _new_table(share)
    return _tables[share]


def _new_table(share: Share) -> _Table:
    device = share.flat.tensor.device
    segments = share.flat.segments
    assert len({segment.index for segment in segments}) == len(segments), "two runs of one tensor"
    blocks: list[tuple[int, int, int, float]] = []
    spans: list[tuple[int, int, int]] = []
    for segment in segments:
        first, row = len(blocks), share.row(segment)
        for start in range(0, segment.length, _BLOCK):
            length = min(_BLOCK, segment.length - start)
            blocks.append((segment.offset + start, length, row, share.decay(segment)))
        spans.append((first, len(blocks), row))

    def column(rows: list[Any], index: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row[index] for row in rows], dtype=dtype, device=device)

    return _Table(
        offsets_N=column(blocks, 0, torch.int64),
        lengths_N=column(blocks, 1, torch.int32),
        rows_N=column(blocks, 2, torch.int32),
        decays_N=column(blocks, 3, torch.float32),
        first_K=column(spans, 0, torch.int32),
        end_K=column(spans, 1, torch.int32),
        rows_K=column(spans, 2, torch.int32),
        partial_QN=torch.empty(EVERYTHING, len(blocks), device=device),
        aligned=all(s.offset % 4 == 0 and s.length % 4 == 0 for s in segments),
    )


@triton.jit
def _locate(offsets, lengths, rows, decays, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of this program's block, which of them exist, and its tensor's row and decay."""
    block = tl.program_id(0)
    start, length = tl.load(offsets + block), tl.load(lengths + block)
    if ALIGNED:  # both hints are needed for 16-byte loads under a mask
        start, length = tl.multiple_of(start, 4), tl.multiple_of(length, 4)
    lane = tl.arange(0, BLOCK)
    return start + lane, lane < length, tl.load(rows + block), tl.load(decays + block)


_AFTER = tl.constexpr(int(Quantity.AFTER))
_BEFORE = tl.constexpr(int(Quantity.BEFORE))
_PRODUCT = tl.constexpr(int(Quantity.PRODUCT))
_MOMENTUM = tl.constexpr(int(Quantity.MOMENTUM))
_PEAK = tl.constexpr(int(Quantity.PEAK))


@triton.jit
def _store_sums(partial, n_blocks, w, u, g):
    block = tl.program_id(0)
    tl.store(partial + block, tl.sum(w * w, axis=0))
    tl.store(partial + n_blocks + block, tl.sum(u * u, axis=0))
    tl.store(partial + 2 * n_blocks + block, tl.sum(g * g, axis=0))


@triton.jit
def _store_momentum(partial, n_blocks, g, m):
    block = tl.program_id(0)
    tl.store(partial + _PRODUCT * n_blocks + block, tl.sum(g * m, axis=0))
    tl.store(partial + _MOMENTUM * n_blocks + block, tl.sum(m * m, axis=0))
    tl.store(partial + _PEAK * n_blocks + block, tl.max(tl.abs(g), axis=0))


@triton.jit
def _store_relative(partial, n_blocks, ROW: tl.constexpr, g, v, bias2, floor):
    r = tl.div_rn(g, tl.maximum(tl.sqrt_rn(tl.div_rn(v, bias2)), floor))
    tl.store(partial + ROW * n_blocks + tl.program_id(0), tl.sum(r * r, axis=0))


@triton.jit
def adam_pass(
    w_, g_, m_, v_, rate,
    offsets, lengths, rows, decays, partial, n_blocks,
    beta1, beta2, gain, gain2, bias1, bias2, bias2_before, eps, floor, weight_decay,
    Q: tl.constexpr, MOVE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments, direction and Q quantities of a block; moves w (MOVE) or leaves u in g."""
    position, valid, row, decay = _locate(offsets, lengths, rows, decays, ALIGNED, BLOCK)
    w = tl.load(w_ + position, mask=valid, other=0.0)
    g = tl.load(g_ + position, mask=valid, other=0.0)
    m = tl.load(m_ + position, mask=valid, other=0.0)
    v = tl.load(v_ + position, mask=valid, other=0.0)
    if Q > _BEFORE:
        _store_relative(partial, n_blocks, _BEFORE, g, v, bias2_before, floor)
        _store_momentum(partial, n_blocks, g, m)
    m = beta1 * m + gain * g
    v = beta2 * v + gain2 * g * g
    if Q > _AFTER:
        _store_relative(partial, n_blocks, _AFTER, g, v, bias2, floor)
    u = tl.div_rn(tl.div_rn(m, bias1), tl.sqrt_rn(tl.div_rn(v, bias2)) + eps)
    u += (weight_decay * decay) * w
    u = tl.where(valid, u, 0.0)
    _store_sums(partial, n_blocks, w, u, g)
    tl.store(m_ + position, m, mask=valid)
    tl.store(v_ + position, v, mask=valid)
    if MOVE:
        tl.store(w_ + position, w - tl.load(rate + row) * u, mask=valid)
    else:
        tl.store(g_ + position, u, mask=valid)


@triton.jit
def move_pass(
    w_, u_, rate, offsets, lengths, rows, decays, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Move the weights: w <- w - rate u."""
    position, valid, row, _ = _locate(offsets, lengths, rows, decays, ALIGNED, BLOCK)
    w = tl.load(w_ + position, mask=valid)
    u = tl.load(u_ + position, mask=valid)
    tl.store(w_ + position, w - tl.load(rate + row) * u, mask=valid)


@triton.jit
def lars_norms_pass(
    w_, g_, m_,
    offsets, lengths, rows, decays, partial, n_blocks, weight_decay,
    Q: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q quantities of a block."""
    position, valid, _, decay = _locate(offsets, lengths, rows, decays, ALIGNED, BLOCK)
    w = tl.load(w_ + position, mask=valid, other=0.0)
    g = tl.load(g_ + position, mask=valid, other=0.0)
    _store_sums(partial, n_blocks, w, g + (weight_decay * decay) * w, g)
    if Q > _BEFORE:
        m = tl.load(m_ + position, mask=valid, other=0.0)
        _store_momentum(partial, n_blocks, g, m)


@triton.jit
def lars_move_pass(
    w_, g_, m_, ratio, rate,
    offsets, lengths, rows, decays, weight_decay, momentum,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Momentum and weights: m <- momentum m + ratio (g + decay w), then w."""
    position, valid, row, decay = _locate(offsets, lengths, rows, decays, ALIGNED, BLOCK)
    w = tl.load(w_ + position, mask=valid)
    g = tl.load(g_ + position, mask=valid)
    m = tl.load(m_ + position, mask=valid)
    d = tl.load(ratio + row) * (g + (weight_decay * decay) * w)
    m = momentum * m + d
    tl.store(m_ + position, m, mask=valid)
    if NESTEROV:
        m = d + momentum * m
    tl.store(w_ + position, w - tl.load(rate + row) * m, mask=valid)


@triton.jit
def reduce_pass(partial, first, end, rows, sums, n_blocks, n_rows, WIDTH: tl.constexpr):
    """Join a segment's parts in a fixed order; program (segment, one of the Q quantities)."""
    segment, quantity = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(first + segment), tl.load(end + segment)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    peak = tl.zeros((WIDTH,), dtype=tl.float32)
    for block in range(start, stop, WIDTH):
        values = tl.load(
            partial + quantity * n_blocks + block + lane, mask=block + lane < stop, other=0.0
        )
        total += values
        peak = tl.maximum(peak, values)
    joined = tl.where(quantity == _PEAK, tl.max(peak, axis=0), tl.sum(total, axis=0))
    tl.store(sums + quantity * n_rows + tl.load(rows + segment), joined)


def check_device(device: torch.device) -> None:
    """Make sure that the kernels run on this device.

    Raises:
        ValueError: Not on a CUDA device, and not in Triton's interpreter either.
    """
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend 'triton' needs a CUDA device, the weights are on {device}.")


def _options(table: _Table) -> dict[str, Any]:
    # fused multiply-adds stated, since Triton's default is about to change
    return {"ALIGNED": table.aligned, "BLOCK": _BLOCK, "num_warps": 8, "enable_fp_fusion": True}


def _reduce(table: _Table, sums_QS: Tensor) -> None:
    segments = (table.first_K, table.end_K, table.rows_K)
    n_rows = sums_QS.shape[1]
    reduce_pass[(len(table.first_K), len(sums_QS))](
        table.partial_QN, *segments, sums_QS, table.blocks, n_rows, WIDTH=_REDUCE
    )


def update_adam(flat: FlatStep, sums_QS: Tensor, rate_S: Tensor | None) -> None:
    """See `Kernels.update_adam`."""
    table, terms = _table(flat.share), AdamTerms(flat.group, flat.number)
    if table.blocks == 0:
        return
    adam_pass[(table.blocks,)](
        *flat.tensors,
        sums_QS if rate_S is None else rate_S,  # unread without MOVE
        *table.columns, table.partial_QN, table.blocks,
        terms.beta1, terms.beta2, terms.gain, 1 - terms.beta2,
        terms.bias1, terms.bias2, terms.bias2_before, terms.eps, terms.floor, terms.weight_decay,
        Q=len(sums_QS), MOVE=rate_S is not None, **_options(table),
    )  # fmt: skip
    _reduce(table, sums_QS)


def move_weights(flat: FlatStep, rate_S: Tensor) -> None:
    """See `Kernels.move_weights`."""
    table = _table(flat.share)
    if table.blocks:
        move_pass[(table.blocks,)](
            flat.weight, flat.gradient, rate_S, *table.columns, **_options(table)
        )


def measure_lars(flat: FlatStep, sums_QS: Tensor) -> None:
    """See `Kernels.measure_lars`."""
    table = _table(flat.share)
    if table.blocks == 0:
        return
    lars_norms_pass[(table.blocks,)](
        *flat.tensors, *table.columns, table.partial_QN, table.blocks, flat.group["weight_decay"],
        Q=len(sums_QS), **_options(table),
    )  # fmt: skip
    _reduce(table, sums_QS)


def move_lars(flat: FlatStep, ratio_S: Tensor, rate_S: Tensor) -> None:
    """See `Kernels.move_lars`."""
    table, group = _table(flat.share), flat.group
    if table.blocks:
        lars_move_pass[(table.blocks,)](
            *flat.tensors, ratio_S, rate_S,
            *table.columns, group["weight_decay"], group["momentum"],
            NESTEROV=group["nesterov"], **_options(table),
        )  # fmt: skip
