"""What an alarm changes for some steps, and which optimizers can do it."""

from typing import Literal

import pytest
import torch
from torch import nn

from mocov3_ds.config.parts import AlarmConfig
from mocov3_ds.monitoring.alarm_response import AlarmResponse, check_response
from mocov3_ds.optim import AdamW, Lamb


def adamw(*, update_clip: bool = False) -> AdamW:
    return AdamW([("w", nn.Parameter(torch.ones(2, 2)))], update_clip=update_clip)


def rates_after_an_alarm(response: Literal["none", "clip", "halve_lr"]) -> list[float]:
    """Learning rates of steps 4 to 8, after an alarm of step 4 with a response of 3 steps."""
    answer = AlarmResponse(AlarmConfig(response=response, steps=3), adamw())
    rates = [answer.adjust_rate(3, 0.4)]
    assert answer.start(4) == ("" if response == "none" else response)
    return rates + [answer.adjust_rate(steps_done, 0.4) for steps_done in range(4, 8)]


def test_the_rate_is_half_for_as_many_steps_as_asked() -> None:
    assert rates_after_an_alarm("halve_lr") == [0.4, 0.2, 0.2, 0.2, 0.4]
    assert rates_after_an_alarm("clip") == rates_after_an_alarm("none") == [0.4] * 5


def test_the_clip_is_on_for_as_many_steps_as_asked() -> None:
    optimizer = adamw()
    response = AlarmResponse(AlarmConfig(response="clip", steps=2), optimizer)
    response.start(4)
    switched = []
    for steps_done in (4, 5, 6):
        response.switch_clip(steps_done)
        switched.append(optimizer.update_clip)
    assert switched == [True, True, False]


def test_a_response_goes_on_after_a_resume() -> None:
    response = AlarmResponse(AlarmConfig(response="halve_lr"), adamw(), active_until=7)
    assert response.adjust_rate(6, 0.4) == 0.2
    assert response.adjust_rate(7, 0.4) == 0.4


def test_an_optimizer_that_cannot_clip_is_refused() -> None:
    clip = AlarmConfig(response="clip")
    lamb = Lamb([("w", nn.Parameter(torch.ones(2, 2)))], lr=1.0)
    with pytest.raises(ValueError, match="clip does not go with Lamb: "):
        check_response(clip, lamb)
    with pytest.raises(ValueError, match="update_clip is always on"):
        check_response(clip, adamw(update_clip=True))
    check_response(clip, adamw())
    check_response(AlarmConfig(response="halve_lr"), lamb)
