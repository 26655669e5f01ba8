"""What a run says at its start and its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mocov3_ds.config.run_config import Config
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.training.run_text import (
    describe_chunks,
    describe_end,
    describe_idle_devices,
    describe_start,
)


def stopped_run(step: int) -> Any:
    return SimpleNamespace(
        config=Config(recipe="tiny", batch=32, runs=Path("runs")),
        loader=SimpleNamespace(
            order=SimpleNamespace(samples=50, batches_per_epoch=1, remainder=18)
        ),
        base=nn.Linear(1000, 1500, bias=False),
        optimizer=torch.optim.SGD([torch.zeros(1)]),
        engine=SimpleNamespace(zero_optimization_stage=lambda: 2),
        model=SimpleNamespace(chunks=Chunks(size=8, keep=1)),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        peak_rate=0.00123,
        step=step,
        total_steps=12,
    )


def test_the_start_in_one_paragraph() -> None:
    text = describe_start(stopped_run(3))
    for fact in (
        "run runs/tiny: ViT 768 x 12 blocks (1.5 M weights with heads), 50 samples",
        "global batch 32 on 1 rank, 1 steps an epoch (18 samples left over each time)",
        "SGD at peak lr 0.00123 = 0.00984 x 32 / 256 (linear rule), momentum 0.99, ZeRO-2, "
        "bfloat16 on cpu, chunks of 8 images (1 kept)",
        "steps 3 to 12",
    ):
        assert fact in text
    assert "\n" not in text


def test_idle_devices_are_named_with_the_command_that_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "3 of 4 GPUs stay idle: deepspeed --module" in describe_start(stopped_run(0))
    assert describe_idle_devices(4) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert describe_idle_devices(1) == ""


def test_what_can_be_pasted_is_quoted() -> None:
    run = stopped_run(5)
    run.config = Config(recipe="tiny", name="my run", runs=Path("a b"))
    lines = describe_end(run).splitlines()
    assert lines[2] == "k-NN:     mocov3 knn 'a b/my run'"
    assert lines[3] == "export:   mocov3 export 'a b/my run'"
    assert lines[4].startswith("curves:   tensorboard --logdir 'a b/my run/tensorboard'   (or")
    run.config = Config(recipe="tiny", name="my run", runs=Path("a b"), log=("csv",))
    assert "curves:   mocov3 report 'a b/my run'   (or" in describe_end(run)


def test_chunks() -> None:
    assert describe_chunks(Chunks()) == "each view in one pass"


def test_the_end_says_what_can_be_done() -> None:
    stopped, finished = (describe_end(stopped_run(step)).splitlines() for step in (5, 12))
    assert (
        stopped[0] == "stopped at step 5 of 12; checkpoint in runs/tiny/checkpoints/step-00000005"
    )
    assert stopped[1] == "resume:   the same command again"
    assert finished[0] == "finished; checkpoint in runs/tiny/checkpoints/step-00000012"
    assert finished[1] == "longer:   --extend runs/tiny --epochs MORE"
    assert [line.split(":")[0] for line in finished[1:]] == ["longer", "k-NN", "export", "curves"]
    troubled = describe_end(stopped_run(5), ["k-NN fell", "3 steps skipped"]).splitlines()
    assert troubled[-2:] == ["warning:  k-NN fell", "warning:  3 steps skipped"]
