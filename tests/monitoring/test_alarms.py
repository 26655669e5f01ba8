"""Early alarms: on arrays, step by step, and across a checkpoint."""

import json
import math

import numpy as np
import pytest

from mocov3_ds.monitoring.alarms import HISTORY, RULES, Alarms, gradient_jump, rms_high, rms_rise

CALM = np.full(60, 1.0)


def test_rules_at_their_thresholds() -> None:
    rms = np.full(60, 0.2)
    rms[40], rms[41] = 0.79, 0.81  # 4 x 0.2 lies between
    assert np.flatnonzero(rms_rise(rms, CALM)).tolist() == [41]
    assert not rms_rise(rms / 10, CALM).any()  # still below 0.3
    grad = np.full(60, 2.0)
    grad[40], grad[50] = 5.9, 6.1
    assert np.flatnonzero(gradient_jump(CALM, grad)).tolist() == [50]
    rms = np.array([2.2, 2.4, np.nan])
    assert rms_high(rms, rms).tolist() == [False, True, False]


def test_nothing_fires_without_a_past_or_on_what_was_not_measured() -> None:
    rising = np.exp(np.arange(60.0))
    assert not rms_rise(rising, rising)[:15].any() and rms_rise(rising, rising)[15]
    assert not gradient_jump(rising, rising)[:30].any() and gradient_jump(rising, rising)[30]
    nothing = np.full(60, np.nan)
    assert not any(rule(nothing, nothing).any() for rule in RULES.values())


@pytest.mark.parametrize("every", [2, 5])
def test_steps_without_signals_neither_blind_nor_break_a_rule(every: int) -> None:
    random = np.random.default_rng(1)
    rms = 0.6 * np.exp(0.8 * random.standard_normal(200))
    grad = np.exp(0.8 * random.standard_normal(200))
    sparse = np.full((2, 200 * every), np.nan)
    sparse[:, ::every] = rms, grad
    for name, rule in RULES.items():
        flags = rule(*sparse)
        assert rule(rms, grad).any(), name
        assert flags[::every].tolist() == rule(rms, grad).tolist(), name
        assert flags.sum() == rule(rms, grad).sum(), name


def test_one_step_without_a_value_does_not_blind_the_next_thirty() -> None:
    grad = np.full(60, 2.0)
    grad[40], grad[45] = np.nan, 9.0
    assert np.flatnonzero(gradient_jump(CALM, grad)).tolist() == [45]
    alarms = Alarms()
    assert [step for step, g in enumerate(grad) if alarms.push(1.0, float(g))] == [45]


@pytest.mark.parametrize("stop", [0, 7, 45, 99])
def test_live_alarms_are_those_of_the_arrays_also_after_a_resume(stop: int) -> None:
    random = np.random.default_rng(0)
    rms = 0.6 * np.exp(0.8 * random.standard_normal(200))
    grad = np.exp(0.8 * random.standard_normal(200))
    grad[60] = np.nan
    alarms, raised = Alarms(), []
    for step, (r, g) in enumerate(zip(rms, grad, strict=True)):
        if step == stop:
            state = json.loads(json.dumps(alarms.state()))
            alarms = Alarms()
            alarms.load(state)
        raised.append(alarms.push(float(r), float(g)))
    for name, rule in RULES.items():
        assert [name in names for names in raised] == rule(rms, grad).tolist(), name
        assert any(name in names for names in raised)
    assert max(len(values) for values in alarms.state().values()) == HISTORY
    assert math.isnan(grad[60])
