"""Signals that ask a run to stop: seen by all ranks, and a second one ends the process."""

import os
import signal
import time

import pytest

from mocov3_ds.distributed import ranks
from mocov3_ds.faults.preemption import Preemption
from tests.ranks_pool import forks, run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_and_the_handlers_come_back(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    preemption = Preemption()
    try:
        assert not preemption.on_any_rank()
        signal.raise_signal(number)
        assert preemption.on_any_rank()
    finally:
        preemption.close()
    assert signal.getsignal(number) == handler


def one_of_two_is_asked() -> list[bool]:
    preemption = Preemption()
    answers = [preemption.on_any_rank()]
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    answers.append(preemption.on_any_rank())
    preemption.close()
    return answers


def test_all_ranks_hear_of_a_signal_to_one() -> None:
    assert run_ranks(2, one_of_two_is_asked) == [[False, True]] * 2


def ask_twice() -> None:
    Preemption()
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    time.sleep(240)
    os._exit(0)


def test_a_second_signal_ends_the_process() -> None:
    process = forks().Process(target=ask_twice)
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGTERM
