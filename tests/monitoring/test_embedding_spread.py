"""Spread and cosines of queries and keys, against their definitions on the whole batch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.monitoring.embedding_spread import feature_signals
from tests.ranks_pool import run_ranks

G, P = 24, 6


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(G, P, generator=generator) * torch.arange(1.0, P + 1)
    return q, q + 0.5 * torch.randn(G, P, generator=generator)


def plain(q: Tensor, k: Tensor) -> dict[str, float]:
    q, k = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (q, k))
    share = torch.linalg.svdvals(q).square()
    share = share / share.sum()
    cosine = q @ k.T
    negatives = cosine[~torch.eye(len(q), dtype=torch.bool)]
    return {
        "features_std": float(q.std(dim=0, unbiased=False).mean()),
        "features_rank": float((-(share * share.log()).sum()).exp()),
        "positive": float(cosine.diagonal().mean()),
        "negative": float(negatives.mean()),
    }


def signals_of_rank() -> dict[str, Any]:
    q, k = (x.chunk(ranks.world_size())[ranks.rank()] for x in batch())
    return feature_signals(q, k)


@pytest.mark.parametrize("world_size", [1, 3])
def test_equal_their_definitions_on_any_number_of_ranks(world_size: int) -> None:
    results = [signals_of_rank()] if world_size == 1 else run_ranks(world_size, signals_of_rank)
    for result in results:
        assert result == pytest.approx(plain(*batch()), rel=1e-5)
        assert result == results[0]


def test_collapse_and_health() -> None:
    same = feature_signals(torch.ones(8, 4), torch.ones(8, 4))
    assert same["features_std"] == pytest.approx(0, abs=1e-3)
    assert same["features_rank"] == pytest.approx(1, abs=1e-3)
    assert (same["positive"], same["negative"]) == pytest.approx((1, 1))
    spread = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    healthy = feature_signals(spread, spread)
    assert healthy["features_std"] == pytest.approx(1 / 4, rel=0.02)
    assert healthy["features_rank"] == pytest.approx(16, rel=0.02)
    assert math.isnan(feature_signals(spread[:1], spread[:1])["negative"])
