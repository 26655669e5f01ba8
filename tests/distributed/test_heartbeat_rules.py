"""What is concluded from beats: deaths, silence, hangs, limits of stages, the exit message."""

import math

import pytest

from mocov3_ds.distributed.heartbeat_rules import (
    FIRST_LIMIT_S,
    Beat,
    Member,
    StageTimer,
    describe_death,
    describe_hang,
    describe_silence,
    exit_message,
    silence_limit,
)


def member(rank: int, **beat: object) -> Member:
    return Member(rank, "host", 100 + rank, 0.0, Beat(**beat))  # type: ignore[arg-type]


def test_only_the_rank_that_others_wait_for_can_hang() -> None:
    waiting = member(0, step=7, stage="step", seconds=500.0, limit=40.0, waits=True)
    reading = member(1, step=7, stage="data", seconds=500.0, limit=960.0)
    assert describe_hang([waiting, reading]) is None
    reading.beat.seconds = 961.0
    message = describe_hang([waiting, reading])
    assert message is not None
    assert "no progress for 961 s (limit 960 s, --hang_timeout) in step 7, data: rank 1" in message
    assert "rank 0" not in message
    # looking at the features, and starting, may take for ever
    assert describe_hang([member(0, step=7, stage="look", seconds=1e6)]) is None


def test_of_many_hanging_ranks_a_few_are_named() -> None:
    ranks = [
        member(rank, step=3, stage="step", seconds=50.0 + rank, limit=40.0, location="f (a.py:1)")
        for rank in range(6)
    ]
    message = describe_hang(ranks)
    assert message is not None
    assert "no progress for 55 s (limit 40 s" in message
    assert message.count("in f (a.py:1)") == 4
    assert message.endswith(" and 2 more hangs.")
    for rank in ranks:
        rank.beat.waits = rank.rank != 2
    message = describe_hang(ranks)
    assert message is not None
    assert ": rank 2 (host host, pid 102) in f (a.py:1) hangs." in message


def test_the_fewest_collectives_entered_tell_who_hangs_where_none_seems_to_wait() -> None:
    """Under NCCL the innocent stand in `float(loss)`, and one is in the middle of its backward."""
    ranks = [
        member(rank, step=9, stage="step", seconds=90.0, limit=40.0, location="f (a.py:1)")
        for rank in range(64)
    ]
    for rank in ranks:
        rank.beat.entered = 812 if rank.rank == 17 else 813
    message = describe_hang(ranks)
    assert message is not None
    assert message.endswith("in step 9, step: rank 17 (host host, pid 117) in f (a.py:1) hangs.")
    ranks[17].beat.entered = 813
    message = describe_hang(ranks)
    assert message is not None
    assert " and 60 more hangs. All have entered the same 813 collectives: the network" in message
    ranks[17].beat.step = 8  # a rank that is behind hangs alone, however many it has entered
    message = describe_hang(ranks)
    assert message is not None and "step 8, step: rank 17" in message and "All" not in message


def test_limits_follow_the_longest_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "100")
    timer, clock, limits = StageTimer(hang_timeout=0.0), 0.0, []
    assert timer.limit() == math.inf  # starting may take for ever
    for step in range(1, 5):
        timer.enter(step, "data", clock)
        limits.append(timer.limit())
        timer.enter(step, "step", clock)
        limits.append(timer.limit())
        clock += 30.0
    # the first two of each kind may take an hour; later ten times the longest, or the least
    assert limits[:4] == [FIRST_LIMIT_S] * 4
    assert limits[4:] == [160.0, 300.0, 160.0, 300.0]
    assert timer.seconds(clock) == 30.0
    assert timer.steps_done == timer.step - 1
    timer.enter(timer.step, "save", clock)
    assert timer.steps_done == timer.step
    given = StageTimer(hang_timeout=5.0)
    given.enter(1, "step", 0.0)
    assert given.limit() == 5.0


def test_a_kill_for_lack_of_memory_is_told_from_other_deaths() -> None:
    dead = member(1, step=3, stage="step", used_gib=30.0, free_gib=0.2, oom_kills=4)
    assert "out-of-memory killer struck" in describe_death(dead, same_host=True, oom_kills=5)
    for same_host, kills in ((True, 4), (False, 5)):
        message = describe_death(dead, same_host=same_host, oom_kills=kills)
        assert "killed, or crashed in native code; it used 30.0 GiB and its host had 0.2" in message
    assert "died without a word in step 3, step: " in message


@pytest.mark.parametrize(("step", "listener_step", "limit"), [(0, 0, 120), (0, 1, 120), (0, 2, 20)])
def test_a_rank_may_be_silent_for_longer_before_the_loop(
    step: int, listener_step: int, limit: float
) -> None:
    """It has not yet said that it is in the loop; a rank in its second step knows that it is."""
    assert silence_limit(member(1, step=step), listener_step, 20.0) == limit
    assert silence_limit(member(1, step=1), listener_step, 20.0) == 20.0


def test_a_rank_that_has_said_goodbye_may_be_silent() -> None:
    leaving = member(1, step=7)
    leaving.is_leaving = True
    assert silence_limit(leaving, 7, 20.0) == math.inf


def test_silence_is_described_with_the_last_known_stage() -> None:
    message = describe_silence(member(1), 25.2)
    assert message.startswith("rank 1 (host host, pid 101) has been silent for 25 s in the start: ")
    assert "silent for 9 s in step 4, save: " in describe_silence(
        member(1, step=4, stage="save"), 9
    )


@pytest.mark.parametrize(
    ("status", "saved", "steps_done", "words"),
    [
        (75, "step-00000120", 127, "The same command continues from the newest checkpoint, "
         "step-00000120 (7 steps since then will be repeated)."),
        (130, "step-00000120", 121, "The same command continues from the newest checkpoint, "
         "step-00000120 (1 step since then will be repeated)."),
        (75, "step-00000120", 120, "The same command continues from the newest checkpoint, "
         "step-00000120."),
        (1, "step-00000120", 120, "Once that is mended, the same command continues from the "
         "newest checkpoint, step-00000120."),
        (75, "", 9, "The same command starts from the beginning: there is no checkpoint yet "
         "(9 steps since then will be repeated)."),
        (1, None, 0, "Once that is mended, the same command tries again."),
    ],
)  # fmt: skip
def test_the_exit_message_says_where_the_same_command_goes_on(
    status: int, saved: str | None, steps_done: int, words: str
) -> None:
    for sentence in ("it ended", "it ended."):
        assert exit_message(sentence, status, saved, steps_done) == f"it ended. {words}"
    assert exit_message("batch 7 cannot be", 2, saved, steps_done) == "batch 7 cannot be"
