"""Time of a step: published speeds, and what more cards do to it."""

import dataclasses

import pytest

from mocov3_ds.model.chunking import Chunks
from mocov3_ds.optim import Lamb, Muon
from mocov3_ds.planning import architecture
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.pace import plan_pace
from mocov3_ds.planning.reach import STREAM
from mocov3_ds.planning.step_setup import Precision
from mocov3_ds.planning.whole_matrices import plan_matrices


def test_more_cards_are_faster_and_cost_more() -> None:
    planned, seconds, card_seconds = plan_run("vit_b16"), [], []
    for cards in (1, 8, 64, 512):
        best = rank_options(planned, read_cluster(f"{cards}xH100"))[0].pace
        assert best is not None
        seconds.append(best.step_s)
        card_seconds.append(best.step_s * cards)
    assert seconds == sorted(seconds, reverse=True)
    assert card_seconds[1:] == sorted(card_seconds[1:])


def test_an_update_takes_as_long_as_its_bytes() -> None:
    cluster = read_cluster("8xH100")
    adamw = plan_run("vit_b16").lay_out(8, 1, recompute_blocks=False)
    lamb = dataclasses.replace(adamw, optimizer=Lamb)
    seconds = plan_pace(lamb, cluster).update_s - plan_pace(adamw, cluster).update_s
    share = architecture.count_trained(adamw.shape) / 8
    more = share * (Lamb.bytes_moved() - adamw.optimizer.bytes_moved())
    assert seconds == pytest.approx(more / (cluster.card.bandwidth * STREAM))


def test_each_further_chunk_adds_its_gradients_to_the_others() -> None:
    cluster = read_cluster("8xH100")
    setup = plan_run("vit_l16").lay_out(8, 1, recompute_blocks=False)
    small, large = (
        plan_pace(dataclasses.replace(setup, chunks=Chunks(size=size)), cluster).update_s
        for size in (32, 64)
    )
    weights = architecture.count_trained(setup.shape)
    added = 16 * 3 * 2 * weights  # 512 images a rank and view: 16 more passes
    assert small - large == pytest.approx(added / (cluster.card.bandwidth * STREAM), rel=0.1)


def test_the_momentum_encoder_moves_as_many_bytes_as_its_kernel() -> None:
    cluster = read_cluster("8xH100")
    setup = plan_run("vit_b16").lay_out(8, 1, recompute_blocks=False)
    setup = dataclasses.replace(setup, chunks=Chunks())
    shard = architecture.count_trained(setup.shape) / 8
    of_optimizer = shard * (setup.optimizer.bytes_moved() + 42)
    of_gradients = 3 * 2 * architecture.count_trained(setup.shape)
    seconds = plan_pace(setup, cluster).update_s
    rest = seconds * cluster.card.bandwidth * STREAM - of_optimizer - of_gradients
    assert rest == pytest.approx(12 * architecture.count_momentum_weights(setup.shape))


def test_the_parts_of_a_step_add_up() -> None:
    setup = plan_run("vit_b16").lay_out(16, 3, recompute_blocks=True)
    pace = plan_pace(setup, read_cluster("16xA100"))
    communication = sum(seconds for _, seconds in pace.collectives)
    parts = (pace.compute_s, pace.elementwise_s, pace.update_s, communication)
    assert all(part > 0 for part in parts)
    assert pace.step_s == pytest.approx(sum(parts))
    assert pace.images_per_s == pytest.approx(4096 / pace.step_s)
    slower = plan_pace(setup, read_cluster("16xA100", network=25))
    assert slower.communication_s > pace.communication_s
    assert slower.compute_s == pace.compute_s


def test_muons_iteration_takes_the_time_of_its_own_precision() -> None:
    cluster = read_cluster("8xH100")
    adamw = plan_run("vit_b16").lay_out(8, 1, recompute_blocks=False)
    card = cluster.card

    def seconds(precision: Precision, ns_dtype: str) -> float:
        without = dataclasses.replace(adamw, precision=precision)
        params = (("ns_dtype", ns_dtype),)
        muon = dataclasses.replace(without, optimizer=Muon, optimizer_params=params)
        return plan_pace(muon, cluster).compute_s - plan_pace(without, cluster).compute_s

    operations = plan_matrices(dataclasses.replace(adamw, optimizer=Muon)).operations
    cases: list[tuple[Precision, str, float]] = [
        ("bf16", "auto", card.low_precision_rate),
        ("bf16", "fp32", card.fp32_rate),
        ("fp32", "bf16", card.low_precision_rate),
        ("tf32", "fp32", card.tf32_rate),
    ]
    for precision, ns_dtype, rate in cases:
        expected = operations / rate / card.reach.products
        assert seconds(precision, ns_dtype) == pytest.approx(expected), (precision, ns_dtype)
