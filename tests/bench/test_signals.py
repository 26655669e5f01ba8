"""The benchmark of the signals prints its table; what it toggles is what it says."""

import pytest
import torch

from mocov3_ds.bench import signals
from tests.ranks_pool import run_ranks


def few_steps() -> tuple[int, int]:
    times = signals.time_whole_steps(["--recipe", "tiny", "--batch", "8"], blocks=2, steps=2)
    return len(times.without), len(times.with_signals)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = {"blocks.0.weight": (8, 8), "blocks.0.bias": (8,)}
    for kind in signals.KINDS:
        signals.print_row(kind, signals.time_optimizer(small, kind, rounds=2))
    signals.print_row("parts", signals.time_parts(rounds=2))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["AdamW", "AdamW, update_clip", "Lamb", "Lars", "parts"]
    for _, without, with_signals, ratio, added in rows:
        assert min(float(without), float(with_signals)) >= 0
        assert float(ratio) > 0
        assert added[0] in "+-"


def test_a_command_of_one_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    signals.run_bench(signals.SignalOptions(shapes=(), rounds=1, blocks=0))
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| tiny recipe: optimizer, row, alarms | ")
    with pytest.raises(ValueError, match="--rounds and --steps must be at least 1"):
        signals.run_bench(signals.SignalOptions(rounds=0))


def test_half_of_the_steps_are_measured() -> None:
    assert run_ranks(1, few_steps, timeout=300) == [(2, 2)]
