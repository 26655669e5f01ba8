"""Hours of a run: by hand for steps and evaluations, and what a slow loader does to them."""

import pytest

from mocov3_ds.planning import architecture
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.pace import DECODE_CPU_S, STORAGE_CPU_S, Pace, plan_pace
from mocov3_ds.planning.run_time import RunTime, plan_run_time

PLANNED, CLUSTER = plan_run("vit_b16"), read_cluster("8xH100")


def pace() -> Pace:
    return plan_pace(PLANNED.lay_out(8, 1, recompute_blocks=False), CLUSTER)


def time(*, epochs: float = 10, images: int = 100_000, cores: int = 0) -> RunTime:
    return plan_run_time(PLANNED, pace(), CLUSTER, epochs=epochs, images=images, cores=cores)


def test_hours_by_hand() -> None:
    run = time()
    assert run.steps == 10 * 24  # 100,000 images hold 24 batches of 4096
    forward = architecture.forward_work(PLANNED.shape).operations
    rate = CLUSTER.card.low_precision_rate * CLUSTER.card.reach.products
    # 240 steps hold 4 evaluations at every 50, of both encoders; 5000 probes over 8 cards
    assert run.knn_s == pytest.approx(8 * 625 * forward / rate)
    assert run.save_s == 0 and time(epochs=100).save_s > 0
    assert run.hours == pytest.approx((240 * pace().step_s + run.knn_s) / 3600)
    spread = CLUSTER.card.reach.spread
    assert run.low_hours == pytest.approx(run.hours / spread)
    assert run.high_hours == pytest.approx(run.hours * spread)


def test_cards_that_wait_for_the_loader() -> None:
    assert not time(cores=10_000).loader_bound
    run = time(cores=4)
    assert run.loader_bound
    assert run.loader_s == pytest.approx(4096 * (DECODE_CPU_S + STORAGE_CPU_S) / 4)
    # faster cards would not help
    assert run.low_hours == pytest.approx(run.hours, rel=0.01)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--images 4095 are fewer than the global batch 4096"):
        time(images=4095)
