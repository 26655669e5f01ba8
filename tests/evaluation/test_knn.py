"""Weighted k-NN against a plain loop, on one rank and on several; the queue of features."""

import math

import pytest
import torch
import torch.nn.functional as F

from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.knn import FeatureQueue, knn_accuracy, vote_class
from tests.ranks_pool import run_ranks


def clouds(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=g)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 0.9 * torch.randn(n, 8, generator=g), labels


BANK, LABELS = clouds(0, 60)
PROBES, TARGETS = clouds(1, 37)


def plain_accuracy(k: int, temperature: float) -> float:
    right = 0
    for probe, target in zip(PROBES.tolist(), TARGETS.tolist(), strict=True):
        scored = sorted(
            (
                (float(F.cosine_similarity(torch.tensor(probe), row, dim=0)), int(label))
                for row, label in zip(BANK, LABELS, strict=True)
            ),
            reverse=True,
        )[:k]
        votes = dict.fromkeys(range(5), 0.0)
        for similarity, label in scored:
            votes[label] += math.exp(similarity / temperature)
        right += max(votes, key=lambda c: votes[c]) == target
    return 100 * right / len(TARGETS)


def part_accuracy(k: int, block: int) -> float:
    rows = slice(ranks.rank(), None, ranks.world_size())
    return knn_accuracy(BANK[rows], LABELS[rows], PROBES, TARGETS, k=k, block=block)


@pytest.mark.parametrize("k", [1, 7, 60, 200])
def test_equals_the_plain_vote(k: int) -> None:
    assert part_accuracy(k, block=10) == pytest.approx(plain_accuracy(k, 0.07))


def several(ks: list[int]) -> list[float]:
    return [part_accuracy(k, block=16) for k in ks]


def test_three_ranks_equal_one() -> None:
    ks = [1, 7, 60]
    expected = [plain_accuracy(k, 0.07) for k in ks]
    for accuracies in run_ranks(3, several, ks):
        assert accuracies == pytest.approx(expected)


def test_votes_cost_memory_by_the_count_of_classes_and_none_is_no_class() -> None:
    ids = torch.tensor([48, 47, 2**40])
    features, labels = torch.eye(3).repeat(20, 1), ids.repeat(20)
    assert knn_accuracy(features, labels, features[:30], labels[:30], k=5) == 100.0
    cosine_PK, label_PK = torch.ones(1000, 3), ids.repeat(1000, 1)
    label_PK[:, 0] = label_PK[:, 1]
    assert vote_class(cosine_PK, label_PK, 0.1).tolist() == [47] * 1000
    labels[::2] = -1  # neither votes nor counts
    assert knn_accuracy(features, labels, features, labels, k=5) == 100.0
    with pytest.raises(ValueError, match="no held-out image has a label"):
        knn_accuracy(features, labels, features[:1], labels[:1])


def test_queue_is_first_in_first_out_and_can_be_rebuilt() -> None:
    queue = FeatureQueue(5, 2)
    for i in range(8):
        queue.push(torch.full((1, 2), float(i)), torch.tensor([i]))
    assert sorted(queue.filled()[1].tolist()) == [3, 4, 5, 6, 7]
    features, labels = queue.oldest_first()
    assert labels.tolist() == [3, 4, 5, 6, 7]
    again = FeatureQueue(5, 2)
    again.refill(features, labels, queue.pushed)
    assert torch.equal(again.labels_N, queue.labels_N)
    assert torch.equal(again.features_ND, queue.features_ND)
    for q in (queue, again):
        q.push(torch.full((2, 2), 9.0), torch.tensor([8, 9]))
    assert torch.equal(again.labels_N, queue.labels_N)
