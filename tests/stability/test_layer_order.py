"""Leads and lags of two layers by hand; `test_verdict` has those of planted series."""

import math
from dataclasses import replace

import numpy as np

from mocov3_ds.stability.events import Excursion
from mocov3_ds.stability.layer_order import cross_lag, event_leads, measure_lead, median_interval
from tests.stability import synthetic


def test_the_lag_of_a_shifted_copy() -> None:
    noise_T = np.exp(np.random.default_rng(0).standard_normal(2000))
    for shift in (-7, 0, 12):
        shifted_T = np.roll(noise_T, shift)
        lag, (low, high), correlation = cross_lag(noise_T[50:-50], shifted_T[50:-50], 20)
        assert lag == shift and low <= shift <= high
        assert correlation > 0.9
    assert cross_lag(np.ones(100), noise_T[:100], 20)[0] == 0


def test_the_interval_of_a_median() -> None:
    middle, (low, high) = median_interval([3, 4, 5, 4, 4, 3, 5])
    assert middle == 4 and 3 <= low <= middle <= high <= 5
    assert math.isnan(median_interval([])[0])


def test_leads_of_events_by_hand() -> None:
    steps_T = np.arange(1, 601)
    noise = np.random.default_rng(0).standard_normal((2, 600))
    shallow_T, deep_T = np.exp(0.02 * noise)
    events = []
    for peak, delay in ((200, 6), (400, -3)):
        shallow_T[peak : peak + 5] *= 20
        deep_T[peak + delay : peak + delay + 5] *= 20
        events.append(Excursion(peak + 1, peak + 5, peak + 3, 20.0))
    assert event_leads(steps_T, shallow_T, deep_T, events) == [6, -3]
    # an event that the deep layer does not show has no lead
    deep_T[380:420] = 1.0
    assert event_leads(steps_T, shallow_T, deep_T, events) == [6]


def test_a_lead_needs_two_trained_layers() -> None:
    series = synthetic.healthy(0).series
    grad_GT = series.grad_linf_GT.copy()
    grad_GT[[0, 2, 3]] = np.nan
    bursts: dict[str, list[Excursion]] = {group: [] for group in series.groups}
    lead = measure_lead(series, bursts, 200)
    assert lead is not None and (lead.first_group, lead.last_group) == ("patch_embed", "block_2")
    assert measure_lead(replace(series, grad_linf_GT=grad_GT), bursts, 200) is None
