"""Logits and entropies of single heads."""

import math

import pytest
import torch

from mocov3_ds.monitoring.attention import attention_of_heads


def test_each_head_by_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 3, 4, 5, generator=generator)
    k = torch.randn(2, 3, 6, 5, generator=generator)
    logits, entropies = attention_of_heads(q, k)
    for head in range(3):
        largest, total = 0.0, 0.0
        for image in range(2):
            for row in q[image, head]:
                scores = [float(row @ column) / math.sqrt(5) for column in k[image, head]]
                whole = sum(math.exp(score) for score in scores)
                shares = [math.exp(score) / whole for score in scores]
                largest = max(largest, *map(abs, scores))
                total -= sum(share * math.log(share) for share in shares)
        assert float(logits[head]) == pytest.approx(largest, rel=1e-5)
        assert float(entropies[head]) == pytest.approx(total / 8, rel=1e-5)


def test_one_head_that_collapsed_shows() -> None:
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 8, 4)
    q[:, 1, :, 0], k[:, 1, 5, 0] = 100.0, 100.0  # looks at one token alone
    logits, entropies = attention_of_heads(q, k)
    assert entropies.tolist() == pytest.approx([math.log(8), 0.0], abs=1e-6)
    assert logits.tolist() == [0.0, 100.0 * 100 / 2]
