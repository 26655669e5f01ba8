"""How well do the neighbours of a feature tell its class? Weighted k-NN, as the paper's monitor.

Features are class tokens (Sec. 4 of the paper). The labelled features that are searched are called
the bank, the features to classify are called probes. `mocov3 knn RUN` takes the whole training
split as the bank; the k-NN monitor of a run takes a queue of features that its steps computed.

Each rank holds some rows of the bank. The k nearest rows of a probe are found on each rank and then
merged, which gives the same as one search of the joined bank. The vote is Wu et al.'s
(arXiv 1805.01978): a neighbour of cosine s votes exp(s / T) for its class.

Shape suffixes: N = bank of this rank, P = probes, D = features, K = neighbours, X = neighbours
of all ranks, C = classes, B = rank batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3_ds.distributed import ranks


def find_nearest(
    bank_ND: Tensor, labels_N: Tensor, probes_PD: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Cosine and label of the k nearest bank rows of each probe, over the banks of all ranks.

    Args:
        bank_ND: features of this rank, rows of length one; ranks may hold different numbers.
        labels_N: label of each row of the bank, int64.
        probes_PD: features to classify, rows of length one, the same on each rank.
        k: number of neighbours; where the joined bank has fewer rows, the similarity is -inf.

    Returns:
        (P, K) cosines, descending, and (P, K) labels; the same on each rank.
    """
    local_k = min(k, len(bank_ND))
    cosine_PK, index_PK = (probes_PD @ bank_ND.T).topk(local_k, dim=1)
    cosine_PK = F.pad(cosine_PK, (0, k - local_k), value=-torch.inf)
    label_PK = F.pad(labels_N[index_PK], (0, k - local_k))
    cosine_PX = ranks.all_gather_stack(cosine_PK).transpose(0, 1).flatten(1)
    label_PX = ranks.all_gather_stack(label_PK).transpose(0, 1).flatten(1)
    cosine_PK, index_PK = cosine_PX.topk(k, dim=1)
    return cosine_PK, label_PX.gather(1, index_PK)


def vote_class(cosine_PK: Tensor, label_PK: Tensor, temperature: float) -> Tensor:
    """Class of each probe (P,): the one with the largest sum of exp(cosine / temperature).

    The table of votes has a column for each class that a neighbour has, whatever its number is.
    """
    label_C, column_PK = torch.unique(label_PK, return_inverse=True)
    shifted_PK = cosine_PK - cosine_PK[:, :1]  # cancels in the argmax, and exp cannot overflow
    weight_PK = (shifted_PK / temperature).exp()
    score_PC = cosine_PK.new_zeros(len(cosine_PK), len(label_C))
    return label_C[score_PC.scatter_add_(1, column_PK, weight_PK).argmax(1)]


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
        bank_ND: features of this rank's rows of the bank, of any length.
        labels_N: label of each row of the bank, int64; rows without one (-1) do not vote.
        probes_PD: features to classify, the same on each rank.
        targets_P: true label of each probe, int64; probes without one (-1) do not count.
        k: number of neighbours that vote.
        temperature: a neighbour votes with exp(cosine / temperature).
        block: number of probes compared in one go; bounds the memory of the similarities.

    Raises:
        ValueError: no probe has a label.
    """
    probes_PD, targets_P = probes_PD[targets_P >= 0], targets_P[targets_P >= 0]
    if not len(targets_P):
        raise ValueError("no held-out image has a label, so that none can be classified rightly.")
    classes_P = classify_probes(
        bank_ND, labels_N, probes_PD, k=k, temperature=temperature, block=block
    )
    return 100.0 * int((classes_P == targets_P).sum()) / len(targets_P)


def classify_probes(
    bank_ND: Tensor,
    labels_N: Tensor,
    probes_PD: Tensor,
    *,
    k: int,
    temperature: float,
    block: int = 1024,
) -> Tensor:
    """Class of each probe (P,) by the weighted vote; see `knn_accuracy`."""
    bank_ND = F.normalize(bank_ND[labels_N >= 0].float(), dim=1)
    labels_N = labels_N[labels_N >= 0]
    classes = []
    for part_PD in torch.split(probes_PD, block):
        probes = F.normalize(part_PD.float(), dim=1)
        classes.append(vote_class(*find_nearest(bank_ND, labels_N, probes, k), temperature))
    return torch.cat(classes)


class FeatureQueue:
    """The last features that training computed on this rank, with their labels, first in first out.

    All ranks push batches of the same size, so that their queues always hold equally many rows.

    Args:
        capacity: most rows that the queue holds.
        dim: width of a feature.
        device: where the rows are kept.
    """

    def __init__(self, capacity: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.features_ND = torch.zeros(capacity, dim, device=device)
        self.labels_N = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.pushed = 0

    def __len__(self) -> int:
        return min(self.pushed, len(self.labels_N))

    def push(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Append rows; beyond the capacity the oldest rows leave."""
        capacity = len(self.labels_N)
        features_BD, labels_B = features_BD[-capacity:], labels_B[-capacity:]
        rows = torch.arange(self.pushed, self.pushed + len(labels_B), device=labels_B.device)
        self.features_ND[rows % capacity] = features_BD.float()
        self.labels_N[rows % capacity] = labels_B
        self.pushed += len(labels_B)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) in the queue, in no particular order."""
        return self.features_ND[: len(self)], self.labels_N[: len(self)]

    def oldest_first(self) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) in the order in which they were pushed."""
        features_ND, labels_N = self.filled()
        shift = -(self.pushed % len(self.labels_N)) if self.pushed > len(self.labels_N) else 0
        return features_ND.roll(shift, 0), labels_N.roll(shift, 0)

    def refill(self, features_ND: Tensor, labels_N: Tensor, pushed: int) -> None:
        """Restore a saved queue.

        Args:
            features_ND: rows of the saved queue, oldest first.
            labels_N: label of each row, int64.
            pushed: number of rows that the saved queue had ever taken.
        """
        self.pushed = max(pushed - len(labels_N), 0)
        self.push(features_ND.to(self.features_ND), labels_N.to(self.labels_N))
