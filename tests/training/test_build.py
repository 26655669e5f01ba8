"""What a run is built of, and what is refused before its folder is touched."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mocov3_ds.config.run_config import Config
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.recipes import parse
from mocov3_ds.training.build import build_run, count_steps
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def test_steps_of_a_run() -> None:
    train: Any = SimpleNamespace(samples=50)
    assert count_steps(Config(batch=16, epochs=4, warmup_epochs=1), train) == (12, 3)
    assert count_steps(Config(batch=16, epochs=2.5, warmup_epochs=0.5), train) == (8, 1.5)
    assert count_steps(Config(batch=16, epochs=0.1, warmup_epochs=0), train) == (1, 0)


def flat_loss() -> ContrastiveLoss:
    loss = ContrastiveLoss(0.2)
    loss.scale = nn.Parameter(torch.tensor(1.0))
    return loss


def refusals(folder: Path) -> list[str]:
    make_set(str(folder / "train"), [20])
    common = [*SMALL, "--data.shards", str(folder / "train"), "--runs", str(folder / "runs")]
    cases: list[tuple[list[str], ContrastiveLoss | None]] = [
        (["--compile_blocks", "--ds", "zero_optimization.stage=3"], None),
        (["--overlap_keys", "--ds", "zero_optimization.stage=3"], None),
        (["--overlap_keys"], None),
        (["--model.fp8"], None),
        (["--model.fp8", "--ds", "bf16.enabled=true"], None),
        (["--ds", "optimizer.params.lr=fast"], None),
        (["--ds", "optimizer.type=Lamb", "--alarm.response", "clip"], None),
        (["--batch", "24"], None),
        ([], flat_loss()),
    ]
    sentences = []
    for flags, loss in cases:
        with pytest.raises(ValueError) as error:
            build_run(parse([*common, *flags]), torch.device("cpu"), loss)
        sentences.append(str(error.value))
    return sentences


def test_refused_before_the_folder_is_touched(tmp_path: Path) -> None:
    [sentences] = run_ranks(1, partial(refusals, tmp_path))
    for sentence, beginning in zip(
        sentences,
        (
            "--compile_blocks does not go with ZeRO stage 3",
            "--overlap_keys does not go with ZeRO stage 3",
            "--overlap_keys has no effect on a CPU",
            "--model.fp8 takes the place of products in bf16, and this network is not in bf16",
            "--model.fp8 needs layers whose sizes are multiples of 16, and one is 24 x 72",
            "optimizer.params.lr",
            "--alarm.response clip",
            f"{tmp_path}/train holds 20 samples, fewer than one global batch of 24",
            "the trained tensor 'loss.scale' has no dimension",
        ),
        strict=True,
    ):
        assert sentence.startswith(beginning), sentence
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def built_run(folder: Path) -> dict[str, Any]:
    make_set(str(folder / "train"), [20, 7, 23])
    make_set(str(folder / "probes"), [33])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--runs", str(folder / "runs")]
    flags += ["--data.probe_shards", str(folder / "probes"), "--decay", "matrices"]
    run = build_run(parse(flags), torch.device("cpu"))
    run.close()
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    return {
        "position": (run.step, run.position, run.total_steps, run.warmup_steps),
        "peak": run.peak_rate,
        "trained": names,
        "optimized": [name for name, _ in run.optimizer.full_state("weight")],
        "conditions": dict(run.chunk_conditions),
        "monitor": run.knn_monitor is not None and run.knn_monitor.count_probes(),
        "config": (folder / "runs/tiny/config.json").exists(),
        "chance": run.chance_loss,
    }


def test_a_new_run(tmp_path: Path) -> None:
    [run] = run_ranks(1, built_run, tmp_path)
    assert run["position"] == (0, 0, 12, 3)
    assert run["peak"] == pytest.approx(1.5e-3 * 16 / 256)
    assert run["trained"] == run["optimized"]
    assert run["conditions"]["world_size"] == 1 and not run["conditions"]["given"]
    assert run["monitor"] == 30
    assert run["config"]
    assert run["chance"] == ContrastiveLoss(0.2).chance_level(16)
