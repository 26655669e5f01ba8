"""Time of a step: published speeds, and what more cards do to it."""

import dataclasses

import pytest

from mocov3_ds.optim import Lamb
from mocov3_ds.planning import architecture
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import ELEMENTWISE_SHARE, PRESETS, read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.pace import plan_pace


def test_published_speeds_of_supervised_vits() -> None:
    """timm's training table, RTX 3090, AMP: what the card's `reachable_share` was set by."""
    card = PRESETS["RTX3090"]
    for name, published in {"vit_b16": 391, "vit_l16": 117, "vit_h14": 39.9}.items():
        shape = plan_run(name).shape
        row = architecture.count_tokens(shape) * shape.vit.dim * 2 * shape.vit.depth
        operations = 3 * architecture.block_work(shape).operations * shape.vit.depth
        seconds = operations / (card.low_precision_rate * card.reachable_share)
        seconds += 53 * row / (card.bandwidth * ELEMENTWISE_SHARE)
        assert 1 / seconds == pytest.approx(published, rel=0.07), name


def test_more_cards_are_faster_and_cost_more() -> None:
    planned, hours, card_hours = plan_run("vit_b16"), [], []
    for cards in (1, 8, 64, 512):
        best = rank_options(planned, read_cluster(f"{cards}xH100"))[0].pace
        assert best is not None
        hours.append(best.hours(100))
        card_hours.append(best.hours(100) * cards)
    assert hours == sorted(hours, reverse=True)
    assert card_hours[1:] == sorted(card_hours[1:])
    # an 8 x H100 machine, ViT-B: steps of 4096 images, 312 an epoch
    assert best.hours(100) == 100 * 312 * best.step_s / 3600


def test_an_update_takes_as_long_as_its_bytes() -> None:
    cluster = read_cluster("8xH100")
    adamw = plan_run("vit_b16").lay_out(8, 1, recompute_blocks=False)
    lamb = dataclasses.replace(adamw, optimizer=Lamb)
    seconds = plan_pace(lamb, cluster).update_s - plan_pace(adamw, cluster).update_s
    share = architecture.count_trained(adamw.shape) / 8
    more = share * (Lamb.bytes_moved() - adamw.optimizer.bytes_moved())
    assert seconds == pytest.approx(more / (cluster.card.bandwidth * ELEMENTWISE_SHARE))


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
