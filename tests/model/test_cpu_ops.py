"""Linear layers and attention of a CPU against the formulas in fp64, and torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3_ds.model import cpu_ops
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.vit import VitShape

pytestmark = pytest.mark.skipif(
    not (torch._C.has_mkl and torch._C._has_mkldnn), reason="torch without MKL or oneDNN"
)
SHAPE = EncoderShape(
    backbone=VitShape(image_size=32, patch_size=8, dim=48, depth=2, heads=4), hidden=40, out=24
)


@pytest.fixture(autouse=True)
def _as_on_a_machine_where_onednn_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "onednn_leads", lambda: True)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """Value, and gradients of each input against a fixed weighing of the value."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*leaves)
    weighing = rows(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weighing)]


def error(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("shape", [(7, 30), (2, 5, 30), (1, 30)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    given = [rows(*shape), rows(50, 30, seed=1), *([rows(50, seed=2)] if bias else [])]
    ours = with_gradients(cpu_ops.linear, *given)
    true = with_gradients(F.linear, *(x.double() for x in given))
    for mine, theirs in zip(ours, true, strict=True):
        assert mine.shape == theirs.shape
        assert error(mine, theirs) < 2e-6  # sums of up to fifty fp32 products
    with torch.no_grad():
        assert torch.equal(cpu_ops.linear(*given), ours[0])


def test_a_linear_layer_takes_any_strides() -> None:
    x, weight = rows(30, 14).t()[::2], rows(30, 50, seed=1).t()
    ours = with_gradients(cpu_ops.linear, x, weight)
    for mine, true in zip(ours, with_gradients(F.linear, x.double(), weight.double()), strict=True):
        assert error(mine, true) < 2e-6


def test_what_is_not_asked_for_is_not_computed() -> None:
    x, weight = rows(4, 6), rows(5, 6, seed=1).requires_grad_()
    [of_weight] = torch.autograd.grad(cpu_ops.linear(x, weight).sum(), [weight])
    assert of_weight.shape == weight.shape
    (cpu_ops.linear(x.requires_grad_(), weight.detach())).sum().backward()
    assert x.grad is not None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain writing."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("looking", [17, 1])
def test_attention_is_the_formula(looking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (rows(5, 3, n, 8, seed=n + i).bfloat16() for i, n in enumerate((looking, 17, 17)))
    ours = with_gradients(cpu_ops.attend, q, k, v)
    true = with_gradients(attention, q.double(), k.double(), v.double())
    for mine, theirs in zip(ours, true, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == torch.bfloat16
        assert error(mine, theirs) < 0.01  # scores and weights have eight bits: measured 0.004
    # how many images' scores are written out at once changes no bit
    monkeypatch.setattr(cpu_ops, "_SCORES", 1)
    assert all(map(torch.equal, with_gradients(cpu_ops.attend, q, k, v), ours))


def plain_twin(ours: BaseEncoder) -> BaseEncoder:
    """The same weights in torch's and timm's own layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_ops, "onednn_leads", lambda: False)
        twin = BaseEncoder(SHAPE)
    assert not any(type(m) in (cpu_ops.Linear, cpu_ops.Attention) for m in twin.modules())
    twin.load_state_dict(ours.state_dict())
    return twin


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_network_gives_what_its_plain_twin_gives(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    ours = BaseEncoder(SHAPE)
    cpu_ops.suit_cpu(ours, smallest_weight=1)
    kinds = [type(module) for module in ours.modules()]
    # qkv, proj, fc1 and fc2 of two blocks, three and two layers of the heads
    assert kinds.count(cpu_ops.Linear) == 2 * 4 + 3 + 2
    assert kinds.count(cpu_ops.Attention) == 1 and nn.Linear not in kinds
    twin = plain_twin(ours)
    x = rows(6, 3, 32, 32).to(dtype)
    found = []
    for network in (ours.to(dtype), twin.to(dtype)):
        features = network.backbone(x)
        (network.projector(features) * rows(6, SHAPE.out, seed=1)).sum().backward()
        parts = ("backbone.blocks", "projector")
        gradients = [
            p.grad.flatten()
            for n, p in network.named_parameters()
            if p.grad is not None and n.startswith(parts)
        ]
        found.append((features.detach(), torch.cat(gradients)))
    for mine, theirs in zip(*found, strict=True):
        assert error(mine, theirs) < within


def test_autocast_is_torchs() -> None:
    layer = nn.Linear(30, 50)
    plain = nn.Linear(30, 50)
    plain.load_state_dict(layer.state_dict())
    cpu_ops.suit_cpu(layer, smallest_weight=1)
    assert type(layer) is cpu_ops.Linear
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(rows(7, 30))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, plain(rows(7, 30)))


def test_small_layers_and_other_machines_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(30, 50), nn.Linear(30, 49))
    cpu_ops.suit_cpu(network, smallest_weight=30 * 50)
    assert [type(layer) for layer in network] == [cpu_ops.Linear, nn.Linear]
    monkeypatch.setattr(cpu_ops, "onednn_leads", lambda: False)
    other = nn.Linear(30, 50)
    cpu_ops.suit_cpu(other, smallest_weight=1)
    assert type(other) is nn.Linear
