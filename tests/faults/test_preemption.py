"""Signals that ask a run to stop: seen by all ranks, and repeated ones change nothing."""

import os
import signal
from unittest import mock

import pytest

from mocov3_ds.distributed import ranks
from mocov3_ds.faults import preemption as preemptions
from mocov3_ds.faults.preemption import (
    SIGNALS,
    AskedToStopError,
    Preemption,
    Stop,
    repeated_signals_ignored,
)
from tests.ranks_pool import run_ranks


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_once_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # nohup, if it started the tests, ignores one
    handler = signal.getsignal(number)
    preemption = Preemption()
    try:
        preemption.enter_loop()
        assert preemption.find_stop() is None
        for repeated in (number, signal.SIGTERM, number):  # as a launcher does
            signal.raise_signal(repeated)
        asked = Stop(f"asked to stop by {number.name}", launcher_is_lost=False)
        assert preemption.find_stop() == asked
    finally:
        preemption.close()
        after = signal.signal(number, before)
    assert after == handler


def test_before_the_loop_a_signal_ends_the_run_at_once() -> None:
    preemption = Preemption(status=75)
    try:
        with pytest.raises(AskedToStopError, match="asked to stop by SIGTERM before") as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.status == 75
        signal.raise_signal(signal.SIGTERM)  # a repeated one does not disturb the end
    finally:
        preemption.close()


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        preemption = Preemption()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        preemption.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_cuts_the_last_words_short() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with repeated_signals_ignored():
        for number in SIGNALS:
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def one_of_two_is_asked(launcher: str) -> list[Stop | None]:
    preemption = Preemption()
    preemption.enter_loop()
    answers = [preemption.find_stop()]
    lost = ""
    if ranks.rank() == 1:
        lost = launcher
        os.kill(os.getpid(), signal.SIGUSR1)
    with mock.patch.object(preemptions.heartbeat, "lost_launcher", lambda: lost):
        answers.append(preemption.find_stop())
    preemption.close()
    return answers


def test_all_ranks_hear_what_one_has_met() -> None:
    asked = Stop("asked to stop by SIGUSR1", launcher_is_lost=False)
    assert run_ranks(2, one_of_two_is_asked, "") == [[None, asked]] * 2
    lost = Stop("its launcher is gone.", launcher_is_lost=True)
    assert run_ranks(2, one_of_two_is_asked, lost.sentence) == [[None, lost]] * 2
