"""The kernels for a CPU give what the formulas give, also where a segment has many blocks."""

import pytest
import torch

from mocov3_ds.optim.block_kernels import BlockKernels
from tests.optim.kernel_errors import check_adamw, check_exact


@pytest.mark.parametrize("kernels", [BlockKernels(), BlockKernels(block=48, row=16)], ids=str)
def test_equals_the_formulas(kernels: BlockKernels) -> None:
    check_exact(kernels)


def test_adamw_in_one_pass_is_torch_adamw() -> None:
    check_adamw(BlockKernels())


def test_square_sums_of_a_million_elements_are_exact() -> None:
    """Where `Tensor.norm` is off by 4e-5 of the norm (2.4 M elements, one thread)."""
    x = torch.randn(2_359_296 + 5, generator=torch.Generator().manual_seed(0))
    expected = float(x.double().square().sum())
    assert BlockKernels().square_sum(x) == pytest.approx(expected, rel=1e-7)
