"""A whole run with LayerScale and sigma-reparametrisation: bf16, chunks, clip, resume, plan."""

from pathlib import Path

import pytest
import torch

from mocov3_ds import train
from mocov3_ds.checkpoints.checkpoint import Checkpoint, list_checkpoints
from mocov3_ds.recipes import parse
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, digests_of, rows_of

CURES = [
    *("--model.sigma_reparam", "--model.layer_scale", "0.1", "--moco.momentum_batch", "64"),
    *("--rate_rule", "sqrt", "--ds", 'optimizer.clip={"type": "zclip", "warmup_steps": 3}'),
]


def train_both(folder: Path) -> None:
    shards = ["--data.shards", str(folder / "train"), "--runs", str(folder / "runs"), "--log"]
    run = [*SMALL, *shards, *CURES, "--knn.probes", "0", "--chunk", "3", "--epochs", "3"]
    run += ["--ds", "bf16.enabled=true", "--signals.noise_every", "2"]
    train.train(parse([*run, "--name", "whole"]))
    train.train(parse([*run, "--name", "parts", "--stop_after_steps", "5"]))
    train.train(parse([*run, "--name", "parts"]))


@pytest.mark.slow
def test_a_run_with_cures_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [20, 7, 23])
    run_ranks(1, train_both, tmp_path)
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    rows = rows_of(whole)
    assert rows_of(parts) == rows and len(rows) == 9
    assert digests_of(parts) == digests_of(whole)
    assert max(row["lr"] for row in rows) == pytest.approx(1.5e-3 * (16 / 256) ** 0.5, rel=0.1)
    assert rows[0]["momentum"] == pytest.approx(0.99 ** (16 / 64), rel=1e-6)
    saved = Checkpoint(list_checkpoints(whole)[-1])
    base, momentum = saved.read_group("base"), saved.read_group("momentum")
    for name in ("u", "v"):
        vector = base[f"backbone.blocks.1.mlp.fc1.{name}"]
        assert vector.dtype == torch.float32
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
        assert not torch.equal(vector, momentum[f"backbone.blocks.1.mlp.fc1.{name}"])
    moved = ("attn.qkv.gain", "ls1.gamma", "mlp.fc2.gain", "ls2.gamma")
    starts = {"gain": 1.0, "gamma": 0.1}
    for name in moved:
        tensor, start = base[f"backbone.blocks.0.{name}"], starts[name.split(".")[-1]]
        assert 0 < float((tensor - start).abs().max()) < 0.1, name
    assert rows[1]["noise_trace"] > 0
