"""The k-NN monitor of a training run: dense on the way, full at both ends.

Both encoders can be watched, each against a queue of its own features: the momentum encoder's
average smooths a dip away, and the gap between the two accuracies is itself a signal.

Shape suffixes: B = rank batch, C H W = image, D = features, P = probes, N = bank of this rank.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.features import Prepare, extract, join
from mocov3_ds.evaluation.knn import FeatureQueue, knn_accuracy

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
"""(crops_BCHW uint8, labels_B, ids_B) of this rank"""


class KnnMonitor:
    """Watches the features of the base encoder against held-out labelled images.

    Args:
        probes: this rank's part of the held-out images; kept as uint8.
        bank: opens this rank's part of the fixed training subset that the full evaluation uses.
        capacity: rows of this rank's queue of recent training features.
        dim: feature width.
        k: neighbours that vote.
        temperature: of the vote.
        prepare: uint8 crops to what the network takes.
        device: where features live.
        momentum_encoder: whether `push` is given its features, too.
    """

    def __init__(
        self,
        *,
        probes: Batches,
        bank: Callable[[], Batches],
        capacity: int,
        dim: int,
        k: int,
        temperature: float,
        prepare: Prepare,
        device: torch.device,
        momentum_encoder: bool = False,
    ) -> None:
        self._probes = list(probes)
        self._bank = bank
        self.queue = FeatureQueue(capacity, dim, device)
        self.momentum_queue = FeatureQueue(capacity, dim, device) if momentum_encoder else None
        self._k, self._temperature = k, temperature
        self._prepare = prepare

    def push(
        self, features_BD: Tensor, labels_B: Tensor, momentum_BD: Tensor | None = None
    ) -> None:
        """Remember the features of a training step, and those of the momentum encoder."""
        labels_B = labels_B.to(features_BD.device)
        self.queue.push(features_BD, labels_B)
        if self.momentum_queue is not None:
            assert momentum_BD is not None
            self.momentum_queue.push(momentum_BD, labels_B)

    def _probe_features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        features_PD, targets_P, _ = join(*extract(backbone, self._probes, self._prepare))
        return features_PD, targets_P

    def dense(self, backbone: nn.Module) -> float:
        """Accuracy in percent with the queue as the bank."""
        probes_PD, targets_P = self._probe_features(backbone)
        return self._accuracy(*self.queue.filled(), probes_PD, targets_P)

    def dense_momentum(self, backbone: nn.Module) -> float:
        """The same for the momentum encoder, with its own queue as the bank."""
        assert self.momentum_queue is not None
        probes_PD, targets_P = self._probe_features(backbone)
        return self._accuracy(*self.momentum_queue.filled(), probes_PD, targets_P)

    def full(self, backbone: nn.Module) -> float:
        """Accuracy in percent with centre crops of the fixed training subset as the bank."""
        probes_PD, targets_P = self._probe_features(backbone)
        features_ND, labels_N, _ = extract(backbone, self._bank(), self._prepare)
        return self._accuracy(features_ND, labels_N, probes_PD, targets_P)

    def _accuracy(self, bank: Tensor, labels: Tensor, probes: Tensor, targets: Tensor) -> float:
        return knn_accuracy(bank, labels, probes, targets, k=self._k, temperature=self._temperature)

    def probes(self) -> int:
        """Held-out images that each evaluation classifies, over all ranks."""
        own = torch.tensor(sum(len(labels) for _, labels, _ in self._probes))
        return int(ranks.all_reduce_sum(own.to(self.queue.labels_N.device)))

    def chance(self) -> float:
        """Accuracy in percent of always naming the most frequent class of all probes."""
        targets_P = torch.cat([labels for _, labels, _ in self._probes])
        classes = 1 + int(ranks.all_reduce_max(targets_P.max().to(self.queue.labels_N.device)))
        counts_C = targets_P.bincount(minlength=classes).to(self.queue.labels_N.device)
        ranks.all_reduce_sum(counts_C)
        return 100.0 * float(counts_C.max()) / float(counts_C.sum())

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """The queues of all ranks joined, oldest rows first: any world size can re-cut them."""
        features_ND, labels_N = self.queue.oldest_first()
        yield "queue.features", ranks.all_gather_stack(features_ND).transpose(0, 1).flatten(0, 1)
        yield "queue.labels", ranks.all_gather_stack(labels_N).transpose(0, 1).flatten()
        yield "queue.pushed", torch.tensor(self.queue.pushed * ranks.world_size())
        if self.momentum_queue is not None:
            momentum_ND, _ = self.momentum_queue.oldest_first()
            joined = ranks.all_gather_stack(momentum_ND).transpose(0, 1).flatten(0, 1)
            yield "momentum_queue.features", joined

    def load_full_state(self, tensors: dict[str, Tensor]) -> None:
        """Take this rank's part of what `full_state` gave."""
        mine = slice(ranks.rank(), None, ranks.world_size())
        labels_N = tensors["queue.labels"][mine]
        pushed = int(tensors["queue.pushed"]) // ranks.world_size()
        self.queue.refill(tensors["queue.features"][mine], labels_N, pushed)
        if self.momentum_queue is not None and "momentum_queue.features" in tensors:
            self.momentum_queue.refill(tensors["momentum_queue.features"][mine], labels_N, pushed)
