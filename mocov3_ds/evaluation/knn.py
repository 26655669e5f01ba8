"""Weighted k-NN on class-token features: the paper's monitor (Sec. 4), on all ranks.

Dense form: a queue of recent training features (already computed by the step) is the bank, a
fixed set of held-out images is classified every few tens of steps. Full form: `mocov3 knn RUN`,
the whole training split as the bank. Each rank holds a part of the bank; the k nearest of a probe
are found on each rank and merged, which is the same as searching one joined bank.

The vote is Wu et al.'s (arXiv 1805.01978): a neighbour of cosine s votes exp(s / T) for its class.

Shape suffixes: N = bank of this rank, P = probes, D = features, K = neighbours, X = neighbours
of all ranks, C = classes, B = rank batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3_ds.distributed import ranks


def nearest(bank_ND: Tensor, labels_N: Tensor, probes_PD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine and label of the k nearest bank rows of each probe, over the banks of all ranks.

    Args:
        bank_ND: unit rows of this rank; ranks may hold different numbers of rows.
        labels_N: int64.
        probes_PD: unit rows, the same on each rank.
        k: neighbours wanted; where the joined bank is smaller, the rest has similarity -inf.

    Returns:
        (P, K) similarities, descending, and (P, K) labels; the same on each rank.
    """
    found = min(k, len(bank_ND))
    near_PK, index_PK = (probes_PD @ bank_ND.T).topk(found, dim=1)
    near_PK = F.pad(near_PK, (0, k - found), value=-torch.inf)
    label_PK = F.pad(labels_N[index_PK], (0, k - found))
    near_PX = ranks.all_gather_stack(near_PK).transpose(0, 1).flatten(1)
    label_PX = ranks.all_gather_stack(label_PK).transpose(0, 1).flatten(1)
    near_PK, index_PK = near_PX.topk(k, dim=1)
    return near_PK, label_PX.gather(1, index_PK)


def vote(near_PK: Tensor, label_PK: Tensor, classes: int, temperature: float) -> Tensor:
    """Class of each probe (P,): the largest sum of exp(similarity / temperature)."""
    weight_PK = ((near_PK - near_PK[:, :1]) / temperature).exp()  # the shift cancels in the argmax
    score_PC = near_PK.new_zeros(len(near_PK), classes).scatter_add_(1, label_PK, weight_PK)
    return score_PC.argmax(1)


def knn_accuracy(
    bank_ND: Tensor,
    labels_N: Tensor,
    probes_PD: Tensor,
    targets_P: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    block: int = 1024,
) -> float:
    """Share of probes whose weighted vote is right, in percent.

    Args:
        bank_ND: features of this rank's part of the bank (normalised here).
        labels_N: their labels, int64, >= 0.
        probes_PD: features to classify, the same on each rank.
        targets_P: their labels.
        k: neighbours.
        temperature: of the vote.
        block: probes compared at a time; bounds the memory of the similarities.
    """
    bank_ND = F.normalize(bank_ND.float(), dim=1)
    classes = 1 + int(ranks.all_reduce_max(torch.stack([labels_N.max(), targets_P.max()]).max()))
    right = 0
    for probes, targets in zip(
        torch.split(probes_PD, block), torch.split(targets_P, block), strict=True
    ):
        near_PK, label_PK = nearest(bank_ND, labels_N, F.normalize(probes.float(), dim=1), k)
        right += int((vote(near_PK, label_PK, classes, temperature) == targets).sum())
    return 100.0 * right / len(targets_P)


class FeatureQueue:
    """The last features that training computed on this rank, with their labels, first in first out.

    All ranks push batches of the same size, so the queues fill alike.
    """

    def __init__(self, capacity: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.features_ND = torch.zeros(capacity, dim, device=device)
        self.labels_N = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.pushed = 0

    def __len__(self) -> int:
        return min(self.pushed, len(self.labels_N))

    def push(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Take the newest rows; the oldest leave."""
        capacity = len(self.labels_N)
        features_BD, labels_B = features_BD[-capacity:], labels_B[-capacity:]
        rows = torch.arange(self.pushed, self.pushed + len(labels_B), device=labels_B.device)
        self.features_ND[rows % capacity] = features_BD.float()
        self.labels_N[rows % capacity] = labels_B
        self.pushed += len(labels_B)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Features and labels pushed so far (at most the capacity)."""
        return self.features_ND[: len(self)], self.labels_N[: len(self)]

    def oldest_first(self) -> tuple[Tensor, Tensor]:
        """The same in the order they were pushed."""
        features_ND, labels_N = self.filled()
        shift = -(self.pushed % len(self.labels_N)) if self.pushed > len(self.labels_N) else 0
        return features_ND.roll(shift, 0), labels_N.roll(shift, 0)

    def refill(self, features_ND: Tensor, labels_N: Tensor, pushed: int) -> None:
        """Become the queue that gave these rows (oldest first) after `pushed` rows in all."""
        self.pushed = max(pushed - len(labels_N), 0)
        self.push(features_ND.to(self.features_ND), labels_N.to(self.labels_N))
