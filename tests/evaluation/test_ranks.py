"""Each metric is the same on one rank and on several, with sizes that do not divide."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation import commands
from mocov3_ds.evaluation.finetune import finetune_encoder
from mocov3_ds.evaluation.flags import KnnOptions
from mocov3_ds.evaluation.linear import train_probe
from tests.evaluation import test_finetune, test_linear
from tests.evaluation.runs import make_labelled_run
from tests.ranks_pool import run_ranks


def judge(folder: Path) -> dict[str, Any]:
    """k-NN, linear probe and fine-tuning: 61 images to learn from, 37 to be judged by."""
    out = folder / f"{ranks.world_size()}"
    probe = test_linear.settings(folder, out=out)
    tuning = replace(
        test_finetune.settings(folder, out=out, batch=12, epochs=2, **test_finetune.PLAIN),
        learning_rate=1e-3,
    )
    found = {"linear": train_probe(probe), "finetune": finetune_encoder(tuning)}
    commands.evaluate_knn(KnnOptions(run=folder / "run", k=5, batch=4, out=out))
    return found


def test_three_ranks_equal_one(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    alone = judge(tmp_path)
    ranks.stop()
    for together in run_ranks(3, judge, tmp_path):
        assert together["linear"] == alone["linear"]
        assert together["finetune"]["top1"] == alone["finetune"]["top1"]
    one, three = (json.loads((tmp_path / f / "results.json").read_text()) for f in "13")
    assert {*one} == {"knn base", "linear base", "finetune base"}
    for name, entry in one.items():
        assert three[name] == entry, name
        assert 0 < entry["top1"] < 100
    # the weights, not only what they score
    for name, tolerance in (("linear", 1e-5), ("finetune", 2e-4)):
        one, three = (load_file(tmp_path / f / f"{name}-base.safetensors") for f in ("1", "3"))
        for key in one:
            if not key.startswith("exp_avg"):
                torch.testing.assert_close(three[key], one[key], atol=tolerance, rtol=1e-3)
