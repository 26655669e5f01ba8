"""Alarms against loss events by hand; `test_verdict` has those of planted series."""

import numpy as np
import pytest

from mocov3_ds.monitoring.alarms import RULES
from mocov3_ds.stability.alarm_quality import alarm_flags, score_alarm
from tests.stability import synthetic


def test_alarm_matching_on_a_case_by_hand() -> None:
    steps = np.arange(1, 101)
    alarm = np.isin(steps, [10, 12, 50, 80])
    quality = score_alarm("name", "group", steps, alarm, [15, 70, 80])
    # 10 and 12 are one episode; 80 is not before itself; 50 predicts nothing
    assert (quality.alarms, quality.right, quality.caught, quality.events) == (3, 1, 1, 3)
    assert quality.leads == (5,)
    assert quality.base_rate == pytest.approx(0.24)  # 7..14, 62..69 and 72..79
    assert (quality.precision, quality.recall) == (1 / 3, 1 / 3)


def test_a_coarse_step_does_not_split_an_alarm() -> None:
    steps = np.arange(50, 50 * 201, 50)
    alarm = np.isin(np.arange(200), [100, 101, 103])
    assert score_alarm("name", "group", steps, alarm, []).alarms == 1


def test_flags_are_those_of_the_measured_steps() -> None:
    series = synthetic.measured_every(synthetic.with_spikes(0).series, 5)
    steps, flags = alarm_flags(series, "patch_embed", "gradient_jump")
    assert (steps % 5 == 0).all() and len(flags) == len(steps) == 400
    rows = series.steps_T % 5 == 0
    rms, grad = (values[0, rows] for values in (series.rms_GT, series.grad_linf_GT))
    assert (flags == RULES["gradient_jump"](rms, grad)).all() and flags.any()
