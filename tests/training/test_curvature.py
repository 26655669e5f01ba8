"""Largest eigenvalue and directional curvature against dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from mocov3_ds.training.curvature import directional_curvature, largest_eigenvalue


def symmetric(values: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    turned, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double())
    return turned @ torch.diag(torch.tensor(values).double()) @ turned.T


def test_the_largest_eigenvalue_not_the_one_of_largest_size() -> None:
    matrix = symmetric([-9.0, *torch.linspace(-1, 4, 60).tolist(), 5.0])
    start = torch.randn(62, generator=torch.Generator().manual_seed(0)).double()
    products: list[Tensor] = []

    def product(u: Tensor) -> Tensor:
        products.append(u)
        return matrix @ u

    value, direction = largest_eigenvalue(product, start, iterations=60, tolerance=1e-9)
    assert value == pytest.approx(5.0, rel=1e-6)
    assert float(direction.norm()) == pytest.approx(1.0)
    torch.testing.assert_close(matrix @ direction, 5 * direction, rtol=0, atol=1e-2)
    cold = len(products)
    products.clear()
    warm, _ = largest_eigenvalue(product, direction, iterations=60, tolerance=1e-4)
    assert warm == pytest.approx(5.0, rel=1e-6) and len(products) <= 4 < cold


def test_it_comes_from_below_and_keeps_to_its_iterations() -> None:
    matrix = symmetric([1.0, 2.0, 3.0, 4.0, 7.0])
    start, found = torch.arange(1.0, 6.0).double(), []
    for iterations in (1, 2, 3, 8):
        value, _ = largest_eigenvalue(
            lambda u: matrix @ u, start, iterations=iterations, tolerance=0.0
        )
        found.append(value)
    assert found == sorted(found) and found[-1] == pytest.approx(7.0)
    unit = start / start.norm()
    assert found[0] == pytest.approx(float(unit @ matrix @ unit))


def test_curvature_along_a_step() -> None:
    matrix, gradient = symmetric([1.0, 2.0, 6.0]), torch.tensor([1.0, -2.0, 0.5]).double()
    scale = torch.tensor([0.1, 2.0, 3.0]).double()
    step = scale * gradient
    expected = float(step @ matrix @ step) / float(gradient @ step)
    assert directional_curvature(lambda u: matrix @ u, gradient, scale) == pytest.approx(expected)

    # a step of rate 2 / curvature leaves a quadratic loss where it was; beyond, the loss rises
    def loss(rate: float) -> float:
        moved = -rate * step
        return float(gradient @ moved + moved @ matrix @ moved / 2)

    assert loss(2 / expected) == pytest.approx(0.0, abs=1e-12)
    assert loss(1.9 / expected) < 0 < loss(2.1 / expected)
    assert math.isnan(directional_curvature(lambda u: u, torch.zeros(3), torch.ones(3)))
