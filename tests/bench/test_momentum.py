"""The momentum benchmark: both ways run, and the error it prints tells fp32 masters from bf16."""

import pytest
import torch

from mocov3_ds.bench import momentum
from mocov3_ds.model.vit import VitShape


def test_the_table_shows_why_the_master_is_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3)
    options = momentum.MomentumOptions(rounds=1, steps=1, drift=200)
    for dtype in (torch.float32, torch.bfloat16):
        momentum.print_row("tiny", tiny, dtype, options)
    fp32, bf16 = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    ours, loop = float(fp32[-2]), float(fp32[-1])
    assert max(ours, loop) < 1e-4  # rounding of fp32 over the way of 200 moves
    ours, loop = float(bf16[-2]), float(bf16[-1])
    assert ours < 1e-4
    assert loop > 0.1
