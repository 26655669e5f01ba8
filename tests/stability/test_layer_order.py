"""Leads of two layers by hand; `test_verdict` has those of planted series."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mocov3_ds.stability.events import Excursion
from mocov3_ds.stability.layer_order import (
    describe_lead,
    event_leads,
    measure_lead,
    median_interval,
    outer_layers,
    pool_leads,
    summarise_leads,
)
from tests.stability import synthetic


def test_the_interval_of_a_median_is_that_of_the_sign_test() -> None:
    # one of 9 is cut off at each end: twice P(at most 1 of 9 coins) is 3.9 %; with two, 18 %
    middle, interval = median_interval([9, 2, 3, 4, 5, 6, 7, 8, 1])
    assert (middle, interval) == (5, (2, 8))
    assert median_interval([3, 4, 5, 4, 4, 3]) == (4, (3, 5))
    assert median_interval([5] * 5)[0] == 5 and math.isnan(median_interval([5] * 5)[1][0])
    assert math.isnan(median_interval([])[0])
    random = np.random.default_rng(0)
    skewed = random.exponential(10, (2000, 12)).astype(int)
    intervals = [median_interval(row.tolist())[1] for row in skewed]
    true = math.floor(10 * math.log(2))
    assert np.mean([low <= true <= high for low, high in intervals]) >= 0.95


def test_order_is_claimed_of_whole_intervals_alone() -> None:
    few = summarise_leads("patch_embed", "block_2", [5, 5, 4])
    assert not few.shallow_first
    assert describe_lead(few) == (
        "patch_embed leads by 5 steps (median of 3 events; an interval needs 6)"
    )
    pooled = pool_leads([few, None, few])
    assert pooled is not None and pooled.shallow_first
    assert describe_lead(pooled) == (
        "patch_embed leads by 5 steps (95 % interval 4 to 5, 6 events)"
    )
    mixed = summarise_leads("patch_embed", "block_2", [-3, -3, -2, -1, -1, 1])
    assert not mixed.shallow_first
    assert describe_lead(mixed) == (
        "block_2 leads by 1.5 steps (95 % interval -3 to 1, 6 events: the order cannot be told)"
    )
    none = summarise_leads("patch_embed", "block_2", [])
    assert describe_lead(none) == "no gradient event that patch_embed and block_2 both show"
    assert pool_leads([None]) is None
    assert describe_lead(None) == "fewer than two layers with gradients"


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


@pytest.mark.parametrize(
    ("groups", "frozen", "layers"),
    [
        (("patch_embed", "cls", "block_0", "block_1", "norm", "projector"), (), (0, 3)),
        (("patch_embed", "cls", "pos_embed", "block_0", "block_1", "norm"), (0,), (3, 4)),
        (("conv1", "bn1", "layer1.0", "layer4.1", "projector", "predictor"), (), (0, 3)),
        (("stem", "stages.0.blocks.0", "stages.3.blocks.1", "norm_pre", "projector"), (), (0, 2)),
        (("conv1", "layer1.0", "layer1.1", "projector"), (0, 1), None),
        (("0", "2", "projector"), (), (0, 1)),
    ],
)
def test_the_outer_layers_of_any_backbone(
    groups: tuple[str, ...], frozen: tuple[int, ...], layers: tuple[int, int] | None
) -> None:
    grad_GT = np.ones((len(groups), 3))
    grad_GT[[*frozen]] = np.nan
    series = replace(synthetic.healthy(0).series, groups=groups, grad_linf_GT=grad_GT)
    assert outer_layers(series) == (layers and tuple(groups[index] for index in layers))
