"""Launchers' variables: whose rank a process is, and what cannot be is refused at the start."""

import os
from collections.abc import Iterator, MutableMapping
from unittest import mock

import pytest

from mocov3_ds.distributed.launcher_variables import (
    NAMES,
    choose_device,
    count_step_tasks,
    fill_variables,
)

BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
FULL = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environment() -> Iterator[MutableMapping[str, str]]:
    """The process's environment without a launcher."""
    with mock.patch.dict(os.environ):  # all is as before afterwards, whatever the test sets
        for name in [n for n in os.environ if n in NAMES or n.startswith("SLURM_")]:
            del os.environ[name]
        yield os.environ


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "4294967290"},
        {"SLURM_STEP_ID": "4294967291"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29755"},
    ],
)
def test_a_batch_script_of_slurm_is_one_rank(
    environment: MutableMapping[str, str],
    caplog: pytest.LogCaptureFixture,
    more: dict[str, str],
) -> None:
    environment.update(BATCH_SCRIPT | more)
    fill_variables()
    assert [environment[name] for name in NAMES[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert "Slurm's job has 2 tasks, but this process is none of them" in caplog.text


def test_a_step_counts_its_own_tasks(environment: MutableMapping[str, str]) -> None:
    assert count_step_tasks() == 1
    environment.update(BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    assert count_step_tasks() == 4
    environment.update({"MASTER_ADDR": "node1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    fill_variables()
    assert [environment[name] for name in NAMES] == ["3", "1", "4", "node1", "29500"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "abc", r"WORLD_SIZE='abc' is no whole number"),
        ("WORLD_SIZE", "0", r"WORLD_SIZE='0' cannot be"),
        ("RANK", "-1", r"RANK='-1' cannot be"),
        ("RANK", "1.5", r"RANK='1.5' is no whole number"),
        ("RANK", "2", r"RANK=2 cannot be with WORLD_SIZE=2: ranks are counted from 0 to 1"),
        ("LOCAL_RANK", "two", r"LOCAL_RANK='two' is no whole number"),
        ("LOCAL_RANK", "7", r"LOCAL_RANK=7 cannot be with WORLD_SIZE=2"),
        ("MASTER_PORT", "x", r"MASTER_PORT='x' is no whole number"),
        ("MASTER_PORT", "70000", r"MASTER_PORT='70000' cannot be"),
    ],
)
def test_what_cannot_be_is_refused(
    environment: MutableMapping[str, str], name: str, value: str, words: str
) -> None:
    environment.update(FULL | {name: value})
    with pytest.raises(ValueError, match=words):
        fill_variables()


def test_what_a_launcher_sets_stays(environment: MutableMapping[str, str]) -> None:
    environment.update(FULL)
    fill_variables()
    assert {name: environment[name] for name in NAMES} == FULL


def test_one_visible_device_is_the_ranks_own() -> None:
    assert [choose_device(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert choose_device(3, 1) == 0
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2, but this process sees 2 devices"):
        choose_device(2, 2)
