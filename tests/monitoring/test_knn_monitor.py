"""The k-NN monitor of a run: its accuracies, its queues across a resume, several ranks."""

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.monitoring.knn_monitor import KnnMonitor
from tests.ranks_pool import run_ranks


def monitor_of(
    probes_PD: Tensor, labels_P: Tensor, bank_ND: Tensor | None = None, capacity: int = 4
) -> KnnMonitor:
    """A monitor of both encoders whose "images" are features already."""
    bank_ND = probes_PD if bank_ND is None else bank_ND
    rows_N = torch.arange(len(bank_ND))
    return KnnMonitor(
        probes=[(probes_PD, labels_P, labels_P)],
        bank=lambda: [(bank_ND, rows_N, rows_N)],
        capacity=capacity,
        dim=2,
        k=1,
        temperature=1.0,
        prepare=lambda images: images,
        device=torch.device("cpu"),
        momentum_encoder=True,
    )


def identity() -> nn.Module:
    backbone = nn.Linear(2, 2, bias=False)
    nn.init.eye_(backbone.weight)
    return backbone


def directions(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_each_encoder_is_judged_by_its_own_queue_and_at_both_ends_by_the_bank() -> None:
    probes_PD, labels_P = directions(0, 60, 120, 180), torch.tensor([0, 1, 2, 3])
    monitor = monitor_of(probes_PD, labels_P, bank_ND=directions(5, 65, 125, 185))
    near, far = directions(2, 62, 122, 182), directions(2, 2, 122, 122)
    monitor.push_features(near, labels_P, far)
    assert monitor.dense_accuracy(identity()) == 100.0
    assert monitor.dense_momentum_accuracy(identity()) == 50.0
    assert monitor.full_accuracy(identity()) == 100.0
    assert monitor.count_probes() == 4


def push_and_move_to(other: KnnMonitor) -> KnnMonitor:
    """Three batches of two rows on each rank, and what a resumed run makes of them."""
    monitor = monitor_of(directions(0), torch.tensor([0]))
    for step in range(3):
        sample = step * 2 * ranks.world_size() + 2 * ranks.rank() + torch.arange(2)
        features_BD = torch.stack([sample, -sample], dim=1).float()
        monitor.push_features(features_BD, sample, 10 * features_BD)
    other.load_full_state(dict(monitor.full_state()))
    return monitor


def queues_after_a_resume() -> list[list[float]]:
    loaded = monitor_of(directions(0), torch.tensor([0]))
    push_and_move_to(loaded)
    assert loaded.momentum_queue is not None
    features_ND, labels_N = loaded.queue.oldest_first()
    momentum_ND, _ = loaded.momentum_queue.oldest_first()
    return [labels_N.tolist(), features_ND[:, 0].tolist(), momentum_ND[:, 0].tolist()]


def test_queues_go_through_a_checkpoint() -> None:
    labels, features, momentum = queues_after_a_resume()
    assert labels == features == [2, 3, 4, 5]
    assert momentum == [20, 30, 40, 50]
    for rank, (labels, features, momentum) in enumerate(run_ranks(2, queues_after_a_resume)):
        assert labels == features == [4 + 2 * rank, 5 + 2 * rank, 8 + 2 * rank, 9 + 2 * rank]
        assert momentum == [10 * label for label in labels]


def chance_of_uneven_ranks() -> float:
    labels_P = torch.tensor([[0, 0, 1], [2**40, 2**40, 2**40, 2**40, 1]][ranks.rank()])
    return monitor_of(torch.zeros(len(labels_P), 2), labels_P).chance_accuracy()


def test_chance_counts_the_probes_of_all_ranks() -> None:
    assert run_ranks(2, chance_of_uneven_ranks) == [50.0, 50.0]
