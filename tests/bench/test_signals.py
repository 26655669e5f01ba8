"""The benchmark of the signals prints its table; what it toggles is what it says."""

import pytest
import torch

from mocov3_ds.bench import signals
from tests.ranks_pool import run_ranks


def few_steps() -> tuple[int, int]:
    from mocov3_ds import config

    tiny = config.RECIPES["tiny"]
    small = config.dataclasses.replace(tiny.config, batch=8)
    config.RECIPES["tiny"] = config.dataclasses.replace(tiny, config=small)
    without, with_ = signals.whole_steps(2, 2)
    return len(without), len(with_)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"blocks.0.weight": (8, 8), "blocks.0.bias": (8,)}
    monkeypatch.setattr(signals, "shapes_of", lambda _: small)
    threads = torch.get_num_threads()
    signals.main(signals.Options(rounds=2, blocks=0))
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        *(
            "| AdamW, vit_s16",
            "| AdamW, update_clip, vit_s16",
            "| Lamb, vit_s16",
            "| Lars, vit_s16",
        ),
        "| tiny recipe: optimizer, row, alarms",
    ]
    with pytest.raises(ValueError, match="--rounds and --steps must be at least 1"):
        signals.main(signals.Options(rounds=0))


def test_half_of_the_steps_are_watched() -> None:
    assert run_ranks(1, few_steps, timeout=300) == [(2, 2)]
