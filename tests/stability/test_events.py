"""Bursts, jumps and spike scores on series with planted events, and on noise alone."""

from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability import events
from mocov3_ds.stability.events import Excursion
from mocov3_ds.stability.verdict import judge
from tests.stability import synthetic


def test_noise_of_a_flat_loss_is_no_event_and_an_early_spike_is_one() -> None:
    steps = np.arange(1, 301)
    found = []
    for seed in range(40):
        loss = 5 + 0.12 * np.random.default_rng(seed).standard_normal(300)
        assert not events.loss_jumps(steps, loss), seed
        loss[39:42] *= 1.3
        found += [jump.first for jump in events.loss_jumps(steps, loss)]
    assert found.count(40) >= 38 and len(found) <= 41
    # a spike before there are 16 values of the past is not told, and hides none later
    loss = 5 + 0.02 * np.random.default_rng(0).standard_normal(300)
    loss[[14, 99]] *= 1.5
    assert [jump.first for jump in events.loss_jumps(steps, loss)] == [100]


FALLING = {
    "exponential": lambda u: 3.3 + 3.1 * np.exp(-u / 0.12),
    "slowly": lambda u: 5.6 + 0.9 * np.exp(-u / 0.25),
    "power": lambda u: 6.6 * (1 + 200 * u) ** -0.15,
}


@pytest.mark.parametrize("steps", [64, 121, 240, 400])
@pytest.mark.parametrize("shape", FALLING)
def test_a_spike_of_one_step_is_told_while_a_short_loss_falls(shape: str, steps: int) -> None:
    at, found, quiet = np.arange(1, steps + 1), 0, 0
    for seed in range(10):
        noise = 0.008 * np.random.default_rng(seed).standard_normal(steps)
        loss = FALLING[shape](at / steps) * np.exp(noise)
        quiet += len(events.loss_jumps(at, loss))
        loss[round(0.6 * steps)] *= 1.3
        jumps = events.loss_jumps(at, loss)
        found += [jump.first for jump in jumps] == [round(0.6 * steps) + 1]
    assert quiet == 0 and found >= 9


def test_a_loss_that_falls_at_once_has_no_event_before_and_hides_none_after() -> None:
    at, found = np.arange(1, 401), 0
    for seed in range(10):
        noise = 0.005 * np.random.default_rng(seed).standard_normal(400)
        loss = np.exp(noise) * np.where(at > 200, 3.0, 3.25)  # a rate that falls in a step
        assert not events.loss_jumps(at, loss)
        loss[300] *= 1.5
        found += [jump.first for jump in events.loss_jumps(at, loss)] == [301]
    assert found >= 8


def test_losses_below_0_are_looked_at_and_rise_upwards() -> None:
    at = np.arange(1, 2001)
    for seed in range(5):
        noise = 0.01 * np.random.default_rng(seed).standard_normal(2000)
        loss = -0.9 + 0.85 * np.exp(-at / 200) + noise
        assert not events.loss_jumps(at, loss)
        loss[[600, 1500]] = -0.3, 0.2
        first, second = events.loss_jumps(at, loss)
        assert (first.peak, second.peak) == (601, 1501)
        assert first.size == pytest.approx(0.6 / 0.9, rel=0.15)
        assert second.size == pytest.approx(1.1 / 0.9, rel=0.1)
    series = replace(synthetic.healthy(0).series, loss_T=loss)
    jumps = {jump.peak: jump.excess for jump in events.plain_jumps(series)}
    assert jumps[601] == pytest.approx(0.6 / 0.9, rel=0.15)
    assert min(jumps.values()) > 0 and np.nanmax(events.loss_excess(series)) < 200
    fallen = replace(series, loss_T=np.where(at == 1000, -1.5, -0.9))
    assert events.plain_jumps(fallen) == []


def test_a_long_spike_is_one_event_of_its_length() -> None:
    at = np.arange(1, 10_001)
    for length, least, most in ((50, 49, 51), (500, 100, 150)):
        noise = 0.01 * np.random.default_rng(length).standard_normal(10_000)
        loss = 3 * np.exp(noise + 0.4 * ((at > 6000) & (at <= 6000 + length)))
        [jump] = events.loss_jumps(at, loss)
        assert jump.first == 6001 and least <= jump.rows <= most


def test_events_close_together_are_one_and_a_single_step_counts() -> None:
    steps = np.arange(1, 401)
    grad = np.exp(0.05 * np.random.default_rng(0).standard_normal(400))
    for begin, length in ((200, 2), (215, 3), (300, 1), (350, 2)):
        grad[begin : begin + length] = 10.0
    [bursts] = events.gradient_bursts(steps, grad[None])
    assert [(b.first, b.last) for b in bursts] == [(201, 218), (301, 301), (351, 352)]
    assert bursts[0].size == pytest.approx(10, rel=0.05)


def test_a_spike_of_all_layers_is_told_where_each_alone_is_within_its_noise() -> None:
    random, steps = np.random.default_rng(0), np.arange(1, 2001)
    grad = np.exp(0.6 * random.standard_t(4, (8, 2000)))
    quiet = events.gradient_bursts(steps, grad)
    grad[:, 1000] = 25.0
    found = events.gradient_bursts(steps, grad)
    assert sum(map(len, quiet)) == 0
    assert all([burst.peak for burst in bursts] == [1001] for bursts in found)
    [alone] = events.gradient_bursts(steps, grad[:1])
    assert alone == []


def test_a_spike_of_all_layers_is_told_below_what_one_layer_needs() -> None:
    steps, found = np.arange(1, 2001), 0
    for seed in range(10):
        log_GT = 0.25 * np.random.default_rng(seed).standard_normal((8, 2000))
        assert not any(events.gradient_bursts(steps, np.exp(log_GT)))
        log_GT[:, 1000] += np.log(3.2)
        bursts = events.gradient_bursts(steps, np.exp(log_GT))
        found += sum([burst.peak for burst in of_one] == [1001] for of_one in bursts) >= 5
    assert found >= 8


def test_a_coarse_step_does_not_split_an_event() -> None:
    steps = np.arange(50, 50 * 201, 50)
    grad = np.exp(0.05 * np.random.default_rng(0).standard_normal(200))
    grad[[100, 101, 103]] = 10.0
    [bursts] = events.gradient_bursts(steps, grad[None])
    assert [(b.first, b.last) for b in bursts] == [(5050, 5200)]


def test_spike_scores_by_hand() -> None:
    values = np.random.default_rng(0).standard_normal(3000) + 100
    values[[1500, 2000, 2500]] = 100 + np.array([5.0, 8.0, 12.0])
    assert events.flag_spikes(values, 7.0).sum() == 2
    assert 3 <= events.flag_spikes(values, 3.2).sum() <= 8
    values[10] = np.nan
    assert events.flag_spikes(values, 7.0).sum() == 2


def test_a_new_level_is_no_endless_event() -> None:
    series = synthetic.healthy(2).series
    grad = series.grad_linf_GT.copy()
    grad[:, 1000:] *= 8
    found = [
        e for e in judge(replace(series, grad_linf_GT=grad)).gradient_events if e.group == "cls"
    ]
    assert len(found) == 1 and found[0].first == 1001
    assert found[0].last < 1000 + 3 * events.WINDOW


def test_events_of_several_groups_are_one_event_of_the_run() -> None:
    early, late = Excursion(10, 20, 15, 5.0), Excursion(35, 40, 36, 9.0)
    far = Excursion(80, 82, 81, 3.0)
    assert events.merge_excursions([far, late, early]) == [Excursion(10, 40, 36, 9.0), far]
    assert events.merge_excursions([late, early], distance=10) == [early, late]


def test_a_plain_jump_is_one_percent_above_the_median() -> None:
    series = synthetic.healthy(0).series
    loss_T = np.full(len(series.steps_T), 4.0)
    loss_T[[50, 300, 500]] = 4.2  # the first lies in the first fall of the loss
    flat = replace(series, loss_T=loss_T)
    assert [(jump.peak, jump.excess) for jump in events.plain_jumps(flat)] == [
        (301, pytest.approx(0.05)),
        (501, pytest.approx(0.05)),
    ]
    ratio_T = events.loss_ratio(flat)
    assert events.plain_jumps(flat, ratio_T) == events.plain_jumps(flat)
    excess_T = events.loss_excess(flat)
    np.testing.assert_array_equal(events.loss_excess(flat, ratio_T), excess_T)
    assert np.isnan(excess_T[:100]).all()
    assert excess_T[300] == pytest.approx(5.0)
    assert np.sum(excess_T > 1) == 2
