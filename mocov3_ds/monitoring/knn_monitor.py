"""The k-NN monitor of a training run: held-out images classified by their nearest neighbours.

Every few tens of steps ("dense") the neighbours are sought in a queue of the training's own recent
features, which costs almost nothing. Before the first step and after the last ("full") they are
sought among centre crops of a fixed training subset.

Both encoders can be monitored, each with a queue of its own features of the same view. The momentum
encoder's average smooths a dip away, so the gap between the two accuracies is itself a signal.

Shape suffixes: B = rank batch, C H W = image, D = features, P = probes of this rank, N = rows of
this rank's queue or bank, C = classes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.features import InputTransform, extract_features, join_ranks
from mocov3_ds.evaluation.knn import FeatureQueue, knn_accuracy

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
"""(crops_BCHW uint8, labels_B, sample_ids_B) of this rank"""


class KnnMonitor:
    """Classifies held-out labelled images by the features of a training run.

    Args:
        probes: Batches of this rank's share of the held-out images; they are kept as uint8.
        bank: Opens this rank's share of the training subset that the full evaluation uses.
        capacity: Number of rows in this rank's queue of recent training features.
        dim: Width D of the features.
        k: Number of neighbours that vote.
        temperature: Temperature of the neighbours' weights in the vote.
        prepare: Turns uint8 crops into what the network takes.
        device: Device that holds the queues.
        momentum_encoder: Whether the momentum encoder is monitored, too.
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
        prepare: InputTransform,
        device: torch.device,
        momentum_encoder: bool = False,
    ) -> None:
        self._probes = list(probes)
        self._bank = bank
        self.queue = FeatureQueue(capacity, dim, device)
        self.momentum_queue = FeatureQueue(capacity, dim, device) if momentum_encoder else None
        self._k, self._temperature = k, temperature
        self._prepare = prepare

    def push_features(
        self, features_BD: Tensor, labels_B: Tensor, momentum_BD: Tensor | None = None
    ) -> None:
        """Add the features of a training step to the queues.

        Args:
            features_BD: Features of the base encoder.
            labels_B: Classes of the samples, int64.
            momentum_BD: Features of the momentum encoder, of the same view; needed where it is
                monitored.
        """
        labels_B = labels_B.to(features_BD.device, non_blocking=True)
        self.queue.push(features_BD, labels_B)
        if self.momentum_queue is not None:
            assert momentum_BD is not None
            self.momentum_queue.push(momentum_BD, labels_B)

    def _probe_features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        features_PD, targets_P, _ = join_ranks(
            *extract_features(backbone, self._probes, self._prepare)
        )
        return features_PD, targets_P

    def dense_accuracy(self, backbone: nn.Module) -> float:
        """Return the accuracy in percent with the queue as the bank; all ranks must call.

        Args:
            backbone: Vision Transformer of the base encoder.
        """
        probes_PD, targets_P = self._probe_features(backbone)
        return self._knn_accuracy(*self.queue.filled(), probes_PD, targets_P)

    def dense_momentum_accuracy(self, backbone: nn.Module) -> float:
        """Return the accuracy in percent of the momentum encoder, with its queue as the bank.

        Args:
            backbone: Vision Transformer of the momentum encoder.
        """
        assert self.momentum_queue is not None
        probes_PD, targets_P = self._probe_features(backbone)
        return self._knn_accuracy(*self.momentum_queue.filled(), probes_PD, targets_P)

    def full_accuracy(self, backbone: nn.Module) -> float:
        """Return the accuracy in percent with the fixed training subset as the bank.

        Args:
            backbone: Vision Transformer of the base encoder.
        """
        probes_PD, targets_P = self._probe_features(backbone)
        features_ND, labels_N, _ = extract_features(backbone, self._bank(), self._prepare)
        return self._knn_accuracy(features_ND, labels_N, probes_PD, targets_P)

    def _knn_accuracy(
        self, bank_ND: Tensor, labels_N: Tensor, probes_PD: Tensor, targets_P: Tensor
    ) -> float:
        return knn_accuracy(
            bank_ND, labels_N, probes_PD, targets_P, k=self._k, temperature=self._temperature
        )

    def count_probes(self) -> int:
        """Return the number of held-out images of all ranks; all ranks must call."""
        count = torch.tensor(sum(len(labels) for _, labels, _ in self._probes))
        return int(ranks.all_reduce_sum(count.to(self.queue.labels_N.device)))

    def chance_accuracy(self) -> float:
        """Return the accuracy in percent of always naming the most frequent class of the probes."""
        labels = [label for _, labels_B, _ in self._probes for label in labels_B.tolist()]
        counts = sum(ranks.gather_objects(Counter(labels)), Counter[int]())
        return 100.0 * max(counts.values()) / counts.total()

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the queues of all ranks joined, oldest rows first; any world size can load them."""
        features_ND, labels_N = self.queue.oldest_first()
        yield "queue.features", ranks.all_gather_stack(features_ND).transpose(0, 1).flatten(0, 1)
        yield "queue.labels", ranks.all_gather_stack(labels_N).transpose(0, 1).flatten()
        yield "queue.pushed", torch.tensor(self.queue.pushed * ranks.world_size())
        if self.momentum_queue is not None:
            momentum_ND, _ = self.momentum_queue.oldest_first()
            joined = ranks.all_gather_stack(momentum_ND).transpose(0, 1).flatten(0, 1)
            yield "momentum_queue.features", joined

    def load_full_state(self, tensors: dict[str, Tensor]) -> None:
        """Fill this rank's queues.

        Args:
            tensors: Everything that `full_state` yielded, by name.
        """
        local_rows = slice(ranks.rank(), None, ranks.world_size())
        labels_N = tensors["queue.labels"][local_rows]
        pushed = int(tensors["queue.pushed"]) // ranks.world_size()
        self.queue.refill(tensors["queue.features"][local_rows], labels_N, pushed)
        if self.momentum_queue is not None and "momentum_queue.features" in tensors:
            self.momentum_queue.refill(
                tensors["momentum_queue.features"][local_rows], labels_N, pushed
            )
