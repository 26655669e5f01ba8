"""Batch norm over all ranks equals one-process BatchNorm1d in value, gradient and statistics."""

import torch
from torch import nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.heads import BatchNormOverRanks, build_predictor, build_projector
from tests.ranks_pool import run_ranks

WHOLE = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
WEIGHTING = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normalise_part(sizes: list[int]) -> dict[str, torch.Tensor]:
    first = sum(sizes[: ranks.rank()])
    rows = slice(first, first + sizes[ranks.rank()])
    norm = BatchNormOverRanks(5).double()
    x = WHOLE[rows].clone().requires_grad_()
    y = norm(x)
    (y * WEIGHTING[rows]).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dw": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


def expect_plain(parts: list[dict[str, torch.Tensor]]) -> None:
    plain = nn.BatchNorm1d(5).double()
    x = WHOLE.clone().requires_grad_()
    y = plain(x)
    (y * WEIGHTING).sum().backward()
    exact = {"rtol": 1e-12, "atol": 1e-12}  # fp64: the order of sums
    torch.testing.assert_close(torch.cat([p["y"] for p in parts]), y.detach(), **exact)
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, **exact)
    # each rank holds its own part of the weight gradient; data parallelism adds them up
    torch.testing.assert_close(sum(p["dw"] for p in parts), plain.weight.grad, **exact)
    for part in parts:
        torch.testing.assert_close(part["mean"], plain.running_mean, **exact)
        torch.testing.assert_close(part["var"], plain.running_var, **exact)


def test_one_process() -> None:
    expect_plain([normalise_part([12])])


def test_three_ranks_with_uneven_rows() -> None:
    expect_plain(run_ranks(3, normalise_part, [5, 4, 3]))


def test_eval_uses_running_statistics() -> None:
    ours, plain = BatchNormOverRanks(5).double(), nn.BatchNorm1d(5).double()
    for _ in range(3):
        ours(WHOLE)
        plain(WHOLE)
    torch.testing.assert_close(ours.eval()(WHOLE), plain.eval()(WHOLE))


def test_low_precision_input_keeps_fp32_statistics() -> None:
    x = (WHOLE * 1000).to(torch.bfloat16)
    norm = BatchNormOverRanks(5).to(torch.bfloat16)
    norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = nn.BatchNorm1d(5)(x.float())
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.01)  # one bf16 rounding


def test_a_bad_batch_does_not_poison_running_statistics() -> None:
    norm = BatchNormOverRanks(5).double()
    norm(WHOLE)
    before = norm.running_mean.clone()
    norm(WHOLE.clone().fill_(float("nan")))
    assert torch.equal(norm.running_mean, before)


def test_layers_are_the_papers() -> None:
    projector, predictor = build_projector(384), build_predictor()
    linears = [[m for m in head if isinstance(m, nn.Linear)] for head in (projector, predictor)]
    assert [(m.in_features, m.out_features) for m in linears[0]] == [
        (384, 4096), (4096, 4096), (4096, 256)]  # fmt: skip
    assert [(m.in_features, m.out_features) for m in linears[1]] == [(256, 4096), (4096, 256)]
    assert all(m.bias is None for head in linears for m in head)
    for head in (projector, predictor):
        norms = [m for m in head if isinstance(m, BatchNormOverRanks)]
        assert [m.weight is not None for m in norms] == [True] * (len(norms) - 1) + [False]
        assert isinstance(head[-1], BatchNormOverRanks)
