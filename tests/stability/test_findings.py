"""Which groups of a series were trained, and shares that have no value without events."""

import math
from dataclasses import replace

import numpy as np

from mocov3_ds.stability.findings import AlarmQuality
from tests.stability import synthetic


def test_frozen_groups_are_not_trained() -> None:
    series = synthetic.healthy(0).series
    assert series.trained_groups() == list(synthetic.GROUPS)
    assert series.first_trained_layer() == "patch_embed"
    grad_GT = series.grad_linf_GT.copy()
    grad_GT[0] = np.nan
    frozen = replace(series, grad_linf_GT=grad_GT)
    assert frozen.trained_groups() == list(synthetic.GROUPS[1:])
    assert frozen.first_trained_layer() == "block_0"  # the class token is no layer
    assert replace(series, grad_linf_GT=grad_GT * np.nan).first_trained_layer() is None


def test_rows_of_a_group() -> None:
    series = synthetic.healthy(0).series
    assert (series.gradient_of("block_1") == series.grad_linf_GT[3]).all()
    assert (series.rms_of("block_1") == series.rms_GT[3]).all()


def test_shares_without_alarms_or_events() -> None:
    quality = AlarmQuality(0, 0, 0, 0, 0.0, (), "rms_high", "patch_embed")
    assert math.isnan(quality.precision) and math.isnan(quality.recall)
    quality = replace(quality, alarms=4, right=3, caught=1, events=2)
    assert (quality.precision, quality.recall) == (0.75, 0.5)
