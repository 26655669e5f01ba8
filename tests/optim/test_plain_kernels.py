"""The plain kernels give what the written-out formulas give, and leave padding alone."""

import pytest
import torch

from mocov3_ds.optim import plain_kernels
from tests.optim.kernel_errors import check_adamw, check_exact


def test_equals_the_formulas() -> None:
    check_exact(plain_kernels)


def test_adamw_in_one_pass_is_torch_adamw() -> None:
    check_adamw(plain_kernels)


def test_square_sums_of_a_million_elements_are_exact() -> None:
    """Where `Tensor.norm` is off by 4e-5 of the norm (2.4 M elements, one thread)."""
    x = torch.randn(2_359_296 + 5, generator=torch.Generator().manual_seed(0))
    expected = float(x.double().square().sum())
    assert float(plain_kernels.square_sum(x)) == pytest.approx(expected, rel=2e-7)
