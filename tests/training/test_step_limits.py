"""Limits of a step: trailing medians, the count of bad steps, both across a resume."""

import json

from mocov3_ds.config.parts import TroubleConfig
from mocov3_ds.training.step_limits import StepLimits, rewound_limits


def test_a_spike_is_measured_against_the_trailing_median() -> None:
    config = TroubleConfig(loss_spike=2.0, gradient_spike=3.0, window=25)
    limits = StepLimits(config, {})
    for step in range(19):
        limits.note_applied_step(5.0 + step % 3, 1.0)
    assert limits.loss_limit() == limits.norm_limit() == float("inf")
    limits.note_applied_step(6.0, 1.0)
    assert limits.loss_limit() == 12.0
    assert limits.norm_limit() == 3.0
    resumed = StepLimits(config, json.loads(json.dumps(limits.state())))
    assert resumed.loss_limit() == 12.0
    for _ in range(25):
        resumed.note_applied_step(1.0, 1.0)
    assert resumed.loss_limit() == 2.0  # older steps are forgotten
    off = StepLimits(TroubleConfig(), {})
    for _ in range(30):
        off.note_applied_step(1.0, 1.0)
    assert off.loss_limit() == off.norm_limit() == float("inf")


def test_bad_steps_are_counted_with_the_batches_that_taught_nothing() -> None:
    limits = StepLimits(TroubleConfig(limit=2), {})
    limits.note_bad_step(5, 5)
    limits.note_bad_step(8, 9)
    assert not limits.exhausted
    limits.note_bad_step(4, 12)  # rewound to before both
    assert limits.exhausted
    assert limits.left_out == [[4, 12]]


def test_a_rewound_run_keeps_its_count_and_takes_the_medians_of_the_checkpoint() -> None:
    config = TroubleConfig(loss_spike=2.0, window=2)
    saved, present = StepLimits(config, {}), StepLimits(config, {})
    for loss in (3.0, 3.0):
        saved.note_applied_step(loss, 1.0)
        present.note_applied_step(loss + 1, 1.0)
    present.note_bad_step(7, 7)
    present.returned_to = 6
    limits = rewound_limits(config, present, saved.state())
    assert (limits.count, limits.left_out, limits.returned_to) == (1, [[7, 7]], 6)
    assert limits.loss_limit() == 6.0
