# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The momentum encoder's move on a GPU: one launch for all tensors, each number read once.

A number of a bf16 network moves 12 bytes: its base weight is read (2), its master read and written
(8), its copy written (2). The same with torch's operations on lists of tensors takes 24, as the
base weights are first written out in fp32.

The tensors lie where they are: a table has the addresses of blocks of at most `_BLOCK` numbers,
each inside one tensor. Under ZeRO-3, where base weights lie elsewhere in each step, each tensor
has a launch of its own. With TRITON_INTERPRET=1 in the environment before triton is imported, the
same code runs on the CPU, slowly, for tests.

Legend: N = blocks of all tensors.
"""

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_BLOCK = 4096
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _moved(master, base, weight):
    """`torch.lerp` of fp32 master and base weights."""
    base = base.to(tl.float32)
    if weight < 0.5:
        moved = master + weight * (base - master)
    else:
        moved = base - (base - master) * (1 - weight)
    return moved


@triton.jit
def move_one_pass(master_, base_, copy_, length, weight, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Move a block of one tensor."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < length
    master = tl.load(master_ + lane, mask=valid)
    master = _moved(master, tl.load(base_ + lane, mask=valid), weight)
    tl.store(master_ + lane, master, mask=valid)
    if COPIES:
        tl.store(copy_ + lane, master.to(copy_.dtype.element_ty), mask=valid)


@triton.jit
def move_pass(
    masters, bases, copies, lengths, weight,
    LOW: tl.constexpr, COPIES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move a block of one of many tensors."""
    block = tl.program_id(0)
    length = tl.load(lengths + block)
    master_ = tl.load(masters + block).to(tl.pointer_type(tl.float32))
    base_ = tl.load(bases + block).to(tl.pointer_type(LOW))
    if ALIGNED:  # the hints are needed for 16-byte loads under a mask
        length = tl.multiple_of(length, 8)
        master_, base_ = tl.multiple_of(master_, 16), tl.multiple_of(base_, 16)
    lane = tl.arange(0, BLOCK)
    valid = lane < length
    master = tl.load(master_ + lane, mask=valid)
    master = _moved(master, tl.load(base_ + lane, mask=valid), weight)
    tl.store(master_ + lane, master, mask=valid)
    if COPIES:
        copy_ = tl.load(copies + block).to(tl.pointer_type(LOW))
        if ALIGNED:
            copy_ = tl.multiple_of(copy_, 16)
        tl.store(copy_ + lane, master.to(LOW), mask=valid)


def move_tensor(master: Tensor, base: Tensor, copy: Tensor | None, weight_of_base: float) -> None:
    """Move one master towards its base weights, and refresh its copy.

    Args:
        master: fp32 master of the tensor, contiguous.
        base: Base weights of the same shape, contiguous.
        copy: Low-precision copy of the master, if the network has one.
        weight_of_base: Share of the base weights, 0 to 1.
    """
    length = master.numel()
    move_one_pass[(triton.cdiv(length, _BLOCK),)](
        master,
        base,
        master if copy is None else copy,
        length,
        weight_of_base,
        COPIES=copy is not None,
        BLOCK=_BLOCK,
        **_OPTIONS,
    )


class MoveTable:
    """Where masters, base weights and low-precision copies lie, as the kernel reads it.

    Args:
        masters: fp32 masters, contiguous, on one device.
        bases: Base weights of the same shapes, contiguous, of one dtype.
        copies: Copies of the masters in that dtype; none where the network runs in fp32.
    """

    def __init__(
        self, masters: Sequence[Tensor], bases: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> None:
        assert len({tensor.dtype for tensor in (*bases, *copies)}) == 1
        assert all(tensor.is_contiguous() for tensor in (*masters, *bases, *copies))
        self._addresses = _addresses(masters, bases, copies)
        self._dtype = _TRITON_DTYPES[bases[0].dtype]
        self._has_copies = bool(copies)
        device = masters[0].device
        columns: list[list[int]] = [[], [], []]
        lengths: list[int] = []
        for tensors in zip(masters, bases, copies or masters, strict=True):
            starts = range(0, tensors[0].numel(), _BLOCK)
            lengths += [min(_BLOCK, tensors[0].numel() - start) for start in starts]
            for column, tensor in zip(columns, tensors, strict=True):
                address, size = tensor.data_ptr(), tensor.element_size()
                column += [address + start * size for start in starts]
        self._aligned = all(length % 8 == 0 for length in lengths) and all(
            address % 16 == 0 for column in columns for address in column
        )
        self._columns = [torch.tensor(column, device=device) for column in columns]
        self._columns.append(torch.tensor(lengths, dtype=torch.int32, device=device))

    def holds(
        self, masters: Sequence[Tensor], bases: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> bool:
        """Whether the tensors still lie where they did when the table was made."""
        return self._addresses == _addresses(masters, bases, copies)

    def move(self, weight_of_base: float) -> None:
        """Move all masters towards their base weights, and refresh the copies.

        Args:
            weight_of_base: Share of the base weights, 0 to 1.
        """
        move_pass[(len(self._columns[0]),)](
            *self._columns,
            weight_of_base,
            LOW=self._dtype,
            COPIES=self._has_copies,
            ALIGNED=self._aligned,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


def _addresses(*lists: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensors in lists for tensor in tensors]
