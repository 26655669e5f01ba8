"""The step as the paper writes it, against numbers worked out by hand and torch's own layers."""

import math

import pytest
import torch
from torch import nn

from mocov3_ds.checks import plain_step


def test_loss_of_keys_that_match() -> None:
    """Identity for all networks: q and k of an image are equal, the others orthogonal to them."""
    x_GD = torch.eye(3, dtype=torch.float64)
    loss = plain_step.batch_loss(nn.Identity(), {}, {}, x_GD, x_GD, temperature=0.5)
    one_direction = math.log(math.exp(2) + 2) - 2
    assert float(loss) == pytest.approx(2 * 2 * 0.5 * one_direction)


def test_a_head_is_linear_layers_with_batch_norm() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(4, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.Softplus(),
        nn.Linear(5, 3, bias=False),
        nn.BatchNorm1d(3, affine=False),
    ).double()
    nn.init.uniform_(layers[1].weight, 0.5, 1.5)
    nn.init.uniform_(layers[1].bias)
    x_GD = torch.randn(7, 4, dtype=torch.float64)
    tensors = {f"projector.{name}": t for name, t in layers.state_dict().items()}
    y_GD = plain_step.apply_head(tensors, "projector", x_GD)
    assert torch.allclose(y_GD, layers(x_GD), rtol=1e-12)


def test_the_momentum_encoder_moves_trained_tensors_alone() -> None:
    momentum = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    base = {"a": torch.tensor(3.0), "b": torch.tensor(3.0)}
    moved = plain_step.move_encoder(momentum, base, {"a"}, 0.75)
    assert (float(moved["a"]), float(moved["b"])) == (1.5, 1.0)


def test_lamb_by_hand() -> None:
    lamb = plain_step.Lamb(lr=0.1, weight_decay=0.5)
    weights = {"matrix": torch.tensor([[3.0, 4.0]]).double(), "bias": torch.tensor([2.0]).double()}
    gradients = {"matrix": torch.tensor([[2.0, -1.0]]).double(), "bias": torch.tensor([5.0])}
    stepped = lamb.step(weights, gradients, matrices={"matrix"})
    # the first direction of Adam is the sign of the gradient; decay 0.5 w is added to a matrix,
    # and the length of the step is lr |w|
    direction = torch.tensor([[1 + 1.5, -1 + 2.0]]).double()
    expected = weights["matrix"] - 0.1 * 5 * direction / direction.norm()
    assert torch.allclose(stepped["matrix"], expected, rtol=1e-5)
    assert float(stepped["bias"]) == pytest.approx(2 - 0.1, rel=1e-5)
