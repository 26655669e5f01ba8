"""Curvature of a loss along its steps, given products with its Hessian.

Adam at rate lr and beta1 0.9 becomes unstable where the largest eigenvalue of P^-1 H passes 38 / lr
(arXiv 2207.14484); a single step along P^-1 g makes the loss rise where the curvature along it
passes 2 / lr (arXiv 2506.04805).

Shape suffix: W = all trained weights in one row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_LEAST_NEW = 0.1
"""share of a movement that must be new: the error of its product grows by its inverse"""

Product = Callable[[Tensor], Tensor]
"""u_W -> a symmetric matrix times u_W"""
Decide = Callable[[bool], bool]
"""what this rank decides -> what all ranks do"""


def directional_curvature(product: Product, gradient_W: Tensor, scale_W: Tensor) -> float:
    """Curvature along the optimizer's step: u^T H u / g^T u with u = P^-1 g.

    Args:
        product: times the Hessian H.
        gradient_W: the gradient g of the loss.
        scale_W: the diagonal of P^-1.

    Returns:
        A number in units of 1 / learning rate; NaN where the gradient is zero.
    """
    u_W = scale_W * gradient_W
    slope = float(gradient_W @ u_W)
    return float(u_W @ product(u_W)) / slope if slope else float("nan")


def largest_eigenvalue(
    product: Product,
    start_W: Tensor,
    *,
    iterations: int,
    tolerance: float,
    decide: Decide = bool,
) -> tuple[float, Tensor]:
    """Largest eigenvalue of a symmetric matrix, from below, and its direction.

    Power iteration that keeps its last movement: each new direction is the best one in the span of
    the present one, its residual and the last movement (Knyazev, 2001, LOBPCG with one vector). It
    takes one product an iteration, as power iteration does, and far fewer of them; and it looks for
    the largest eigenvalue and not for the one of largest size. A last product makes the value, so
    that errors of earlier ones cannot raise it.

    Args:
        product: gives the matrix times a direction.
        start_W: direction to start from, not zero: the last one found, or random numbers.
        iterations: products at most beside the last, 1 or more.
        tolerance: it ends when an iteration adds less than this share to the value.
        decide: called with whether to end; ranks that might round differently agree here.

    Returns:
        The eigenvalue and a direction (W,) of length 1.
    """
    x_W = start_W / start_W.norm()
    hx_W = product(x_W)
    value = float(x_W @ hx_W)
    moved: list[tuple[Tensor, Tensor]] = []  # the last movement and its product
    for _ in range(iterations - 1):
        residual_W = hx_W - value * x_W
        basis = _add_direction([(x_W, hx_W)], residual_W, None)
        if len(basis) == 1:
            break
        direction_W = basis[1][0]
        basis[1] = (direction_W, product(direction_W))
        for vector_W, image_W in moved:
            basis = _add_direction(basis, vector_W, image_W, least=_LEAST_NEW)
        small = torch.tensor([[float(a @ hb) for _, hb in basis] for a, _ in basis]).double()
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        shares = vectors[:, -1].tolist()
        movement = _combine(basis[1:], shares[1:])
        moved = [movement]
        x_W = shares[0] * x_W + movement[0]
        hx_W = shares[0] * hx_W + movement[1]
        length = float(x_W.norm())
        x_W, hx_W = x_W / length, hx_W / length
        previous, value = value, float(values[-1])
        if decide(value - previous <= tolerance * abs(value)):
            break
    return float(x_W @ product(x_W)), x_W


Pair = tuple[Tensor, Tensor]
"""a direction and the matrix times it"""


def _add_direction(
    basis: list[Pair], vector_W: Tensor, image_W: Tensor | None, least: float = 1e-5
) -> list[Pair]:
    """An orthonormal basis with one more direction, unless no more of it than `least` is new."""
    full_length = float(vector_W.norm())
    for _ in range(2):  # once more against rounding
        for unit_W, unit_image_W in basis:
            share = float(unit_W @ vector_W)
            vector_W = vector_W - share * unit_W
            image_W = None if image_W is None else image_W - share * unit_image_W
    length = float(vector_W.norm())
    if not length > least * full_length:  # also where it is NaN
        return basis
    image_W = torch.zeros_like(vector_W) if image_W is None else image_W / length
    return [*basis, (vector_W / length, image_W)]


def _combine(basis: list[Pair], shares: list[float]) -> Pair:
    vector_W, image_W = (torch.zeros_like(row_W) for row_W in basis[0])
    for share, (unit_W, unit_image_W) in zip(shares, basis, strict=True):
        vector_W.add_(unit_W, alpha=share)
        image_W.add_(unit_image_W, alpha=share)
    return vector_W, image_W
