"""A run by Muon: it stops and goes on bit for bit, and its frozen projection stays."""

from pathlib import Path

import pytest
import torch

from mocov3_ds import train
from mocov3_ds.checkpoints.checkpoint import Checkpoint, list_checkpoints
from mocov3_ds.recipes import parse
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, digests_of, rows_of

MUON = (
    *("--ds", "optimizer.type=Muon", "--ds", "optimizer.params.qkv=heads"),
    *("--ds", "zero_optimization.stage=2", "--save.keep", "9"),
)


def train_runs(folder: Path, *runs: tuple[str, ...]) -> None:
    shards = ["--data.shards", str(folder / "train"), "--runs", str(folder / "runs"), "--log"]
    for flags in runs:
        train.train(parse([*SMALL, *shards, "--knn.probes", "0", *MUON, *flags]))


@pytest.mark.slow
def test_a_run_by_muon_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """On two ranks at ZeRO-2, where the owners' exchange is in each step."""
    make_set(str(tmp_path / "train"), [20, 7, 23])
    broken = ("--name", "broken")
    run_ranks(
        2, train_runs, tmp_path, ("--name", "whole"), (*broken, "--stop_after_steps", "4"), broken
    )
    whole, other = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert rows_of(other) == rows_of(whole)
    assert digests_of(other) == digests_of(whole)
    moments = Checkpoint(list_checkpoints(whole)[-1]).tensor_names("optimizer")
    matrix = "base.backbone.blocks.0.attn.qkv.weight"
    assert f"exp_avg/{matrix}" in moments and f"exp_avg_sq/{matrix}" not in moments
    first, *_, last = [Checkpoint(folder) for folder in list_checkpoints(whole)]
    names = {name for name in first.tensor_names("base") if name.endswith("weight")}
    stay = {
        name
        for name in names
        if torch.equal(first.read_tensor("base", name), last.read_tensor("base", name))
    }
    assert stay == {"backbone.patch_embed.proj.weight"}
