"""Batch norm inside of a backbone equals one process's in value, gradient and statistics."""

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocov3_ds.distributed import ranks
from mocov3_ds.model.body_norm import BodyBatchNorm, spread_batch_norms
from tests.ranks_pool import run_ranks

KINDS = ("rows", "images", "activated", "plain")


def build(kind: str) -> nn.Module:
    """A batch norm of torch or timm in fp64, with weights that differ from 1 and 0."""
    if kind == "rows":
        norm: nn.Module = nn.BatchNorm1d(5)
    elif kind == "activated":
        norm = BatchNormAct2d(5, act_layer=nn.SiLU)
    else:
        norm = nn.BatchNorm2d(5, affine=kind == "images", momentum=0.3)
    for index, parameter in enumerate(norm.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.linspace(0.5, 2.0, 5) - index)
    return norm.double()


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (6, 5) if kind == "rows" else (6, 5, 3, 2)
    x, weighting = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return x * 3 + 7, weighting


def run_part(norm: nn.Module, kind: str, rows: slice) -> dict[str, Tensor]:
    x, weighting = inputs(kind)
    leaf = x[rows].clone().requires_grad_()
    y = norm(leaf)
    (y * weighting[rows]).sum().backward()
    grads = {f"d{name}": p.grad for name, p in norm.named_parameters()}
    return {"y": y.detach(), "dx": leaf.grad, **grads, **dict(norm.named_buffers())}


def run_ours(sizes: list[int]) -> dict[str, dict[str, Tensor]]:
    first = sum(sizes[: ranks.rank()])
    rows = slice(first, first + sizes[ranks.rank()])
    return {kind: run_part(BodyBatchNorm(build(kind)), kind, rows) for kind in KINDS}


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_equals_one_process(sizes: list[int]) -> None:
    parts = [run_ours(sizes)] if len(sizes) == 1 else run_ranks(len(sizes), run_ours, sizes)
    for kind in KINDS:
        plain = run_part(build(kind), kind, slice(None))
        ours = [part[kind] for part in parts]
        assert {*plain} == {*ours[0]}, kind
        for name, wanted in plain.items():
            if name in ("y", "dx"):
                found = torch.cat([part[name] for part in ours])
            elif name.startswith("d"):  # each rank has its own part, which the engine adds up
                found = torch.stack([part[name] for part in ours]).sum(0)
            else:
                found = ours[-1][name]
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11, msg=f"{kind} {name}")


def test_eval_uses_running_statistics() -> None:
    for kind in KINDS:
        plain, (x, _) = build(kind), inputs(kind)
        ours = BodyBatchNorm(build(kind))
        for norm in (plain, ours):
            norm(x), norm(2 * x)
            norm.eval()
        torch.testing.assert_close(ours(x), plain(x))


def test_a_recomputed_pass_does_not_move_the_statistics_again() -> None:
    x, _ = inputs("images")
    once, recomputed = BodyBatchNorm(build("images")), BodyBatchNorm(build("images"))
    once(x).sum().backward()
    checkpoint(recomputed, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert x.grad is not None and int(recomputed.num_batches_tracked) == 1
    assert torch.equal(once.running_var, recomputed.running_var)


def test_running_statistics_stay_fp32() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    assert spread_batch_norms(network)
    network.to(torch.bfloat16)
    assert isinstance(network[1], BodyBatchNorm)
    assert (
        network[1].running_var.dtype == torch.float32 and network[1].weight.dtype == torch.bfloat16
    )
    y = network(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and network.eval()(y[:, :3]).dtype == torch.bfloat16
    assert int(network[1].num_batches_tracked) == 1


def test_names_stay_and_other_norms_over_the_batch_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.LayerNorm(5))
    names = {*network.state_dict()}
    shared = network[1]
    network.append(nn.Sequential(shared))
    assert spread_batch_norms(network) and names <= {*network.state_dict()}
    assert network[3][0] is network[1]
    assert not spread_batch_norms(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="InstanceNorm2d, which has statistics of a batch"):
        spread_batch_norms(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)))
    with pytest.raises(ValueError, match="no plain batch norm with running averages"):
        spread_batch_norms(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
