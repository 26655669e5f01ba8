"""How well did an early alarm predict the loss events of a finished run?

Shape suffix: T = steps logged.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mocov3_ds.monitoring.alarms import RULES
from mocov3_ds.stability.events import merge_distance
from mocov3_ds.stability.findings import AlarmQuality, Flags, Series, Steps
from mocov3_ds.stability.trailing import is_measured

HORIZON = 8
"""an alarm predicts a loss event that begins within so many steps after it"""


def judge_alarms(series: Series, group: str, onsets: Sequence[int]) -> tuple[AlarmQuality, ...]:
    """Quality of each alarm rule on one group; `onsets` are the first steps of loss events."""
    return tuple(
        score_alarm(name, group, *alarm_flags(series, group, name), onsets) for name in RULES
    )


def alarm_flags(series: Series, group: str, rule: str) -> tuple[Steps, Flags]:
    """Measured steps of a group, and whether the rule of `RULES` with this name fires at each."""
    rms_T, grad_T = series.rms_of(group), series.gradient_of(group)
    rows = is_measured(rms_T, grad_T)
    return series.steps_T[rows], RULES[rule](rms_T[rows], grad_T[rows])


def score_alarm(
    alarm: str, group: str, steps_T: Steps, alarm_T: Flags, onsets: Sequence[int]
) -> AlarmQuality:
    """Match an alarm with the loss events that begin 1 to 8 steps after it.

    Args:
        alarm: name of the alarm rule.
        group: layer group that the alarm watches.
        steps_T: logged steps in which the rule's signals were measured.
        alarm_T: whether the rule fired.
        onsets: first step of each loss event, ascending.
    """
    episodes = list(_split_episodes(steps_T[alarm_T], merge_distance(steps_T)))
    leads = []
    soon_T = np.zeros(len(steps_T), bool)
    for onset in onsets:
        early = [e for e in episodes if np.any((onset - HORIZON <= e) & (e < onset))]
        if early:
            leads.append(int(onset - early[-1][0]))
        soon_T |= (steps_T >= onset - HORIZON) & (steps_T < onset)
    return AlarmQuality(
        alarms=len(episodes),
        right=sum(bool(np.any(np.isin(e, steps_T[soon_T]))) for e in episodes),
        caught=len(leads),
        events=len(onsets),
        base_rate=float(np.mean(soon_T)) if len(soon_T) else math.nan,
        leads=tuple(leads),
        alarm=alarm,
        group=group,
    )


def _split_episodes(steps: Steps, distance: int) -> Iterator[Steps]:
    """Steps of an alarm, split where it was silent for more steps than `distance`."""
    for episode in np.split(steps, np.flatnonzero(np.diff(steps) > distance) + 1):
        if len(episode):
            yield episode
