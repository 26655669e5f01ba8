"""Speeds computed from counts: the counted step, and what a launch or a byte less is worth."""

from dataclasses import replace

import pytest

from mocov3_ds.bench.predicted import NETWORKS, TIMES, predict_row, step_seconds
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.options import rank_options
from mocov3_ds.planning.step_setup import Passes


def test_launches_of_the_counted_step_and_of_more_passes() -> None:
    counted = NETWORKS["vit_l16"]
    assert counted.of(counted.passes) == pytest.approx(3904 + 4184 + 13986 + 2970)
    # one more repeated pass launches what one of queries does
    more = counted.of(Passes(forward=16, recomputed=11)) - counted.of(counted.passes)
    assert more == pytest.approx(3904 / 16)


def test_a_step_takes_the_longer_of_card_and_host() -> None:
    cluster = read_cluster("8xH200")
    [option, *_] = rank_options(plan_run("vit_s16", batch=4096), cluster, (1,))
    assert option.pace is not None
    pace, setup, bandwidth = option.pace, option.setup, cluster.card.bandwidth
    idle = step_seconds(pace, setup, 0, replace(TIMES["after"], waits=0), bandwidth)
    assert idle == pytest.approx(pace.step_s, rel=1e-9)
    few, many = (
        step_seconds(pace, setup, launches, TIMES["after"], bandwidth) for launches in (1, 10**6)
    )
    assert few == pytest.approx(idle + 3 * 20e-6, rel=1e-9)
    assert many == pytest.approx(5 + pace.update_s + pace.communication_s + 3 * 20e-6, rel=1e-9)
    before = step_seconds(pace, setup, 1, TIMES["before"], bandwidth)
    copied_s = 512 * 2 * 3 * 224 * 224 / 25e9
    assert before > few + copied_s + 28 * 20e-6


def test_a_row_says_layout_and_three_times() -> None:
    row = predict_row("vit_l16", "8xRTX4090", 4096)
    assert row[:2] == ["vit_l16", "8 x RTX4090"] and row[2].startswith("chunks of")
    before, after, compiled = (int(cell.split()[0]) for cell in row[-3:])
    assert before > after > compiled
