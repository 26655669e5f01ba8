"""Pretraining from Python: keywords, images and networks in memory, run after run."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.pretraining import flags_of
from mocov3_ds.recipes import parse
from tests.data.sets import make_set, picture
from tests.test_train import environment, rows_of


def test_keywords_are_flags() -> None:
    settings = {
        "batch": 8,
        "epochs": 2,
        "deterministic": True,
        "chunk": None,
        "views": {"image_size": 32, "blur_p": (0.5, 0.0), "fixed": False},
        "model": {"depth": 2, "group_lr": ["block_0=0.5", "norm=0"]},
        "ds": {"zero_optimization": {"stage": 2}, "optimizer": {"params": {"lr": 0.1}}},
    }
    parsed = parse(flags_of(settings))
    config = parsed.config
    assert (config.batch, config.epochs, config.deterministic) == (8, 2.0, True)
    assert config.views.blur_p == (0.5, 0.0)
    assert not config.views.fixed
    assert config.model.group_lr == ("block_0=0.5", "norm=0")
    assert parsed.engine["zero_optimization"]["stage"] == 2
    assert parsed.engine["optimizer"]["params"]["lr"] == 0.1
    lars = {"type": "Lars", "params": {"lr": 0.5, "momentum": 0.9}}
    assert parse(flags_of({"ds": {"optimizer": lars}})).engine["optimizer"] == lars
    for wrong, words in (
        ({"bacth": 8}, r"no setting bacth \(did you mean batch\?\)"),
        ({"model": {"deep": 8}}, r"no setting model\.deep \(did you mean depth\?\)"),
        ({"model": 8}, "model takes a dict of settings, not 8"),
    ):
        with pytest.raises(ValueError, match=words):
            flags_of(wrong)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.mix = nn.Linear(16 * 4, 24)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.mix(self.patches(x_BCHW).flatten(1))
        return features_BD


SETTINGS: dict[str, Any] = {
    "batch": 16,
    "epochs": 2,
    "warmup_epochs": 1,
    "views": {"image_size": 16},
    "model": {"hidden": 32, "out": 16},
    "data_settings": {"lanes": 4, "threads": 2},
    "log": ["csv"],
}


def traces() -> dict[str, Any]:
    """What a run must not leave in a process."""
    return {
        "threads": {t.name for t in threading.enumerate()} - {"tqdm_monitor"},  # of the process
        "signals": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        "environment": dict(os.environ),
        "group": torch.distributed.is_initialized(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def train_twice(folder: str) -> None:
    """Two runs of one network and one dataset, and one of the same images in shards."""
    import mocov3_ds

    os.chdir(folder)
    torch.manual_seed(5)
    network, random_state = Network(), traces()["random"]
    weights = {n: t.clone() for n, t in network.state_dict().items()}
    images = [picture(number) for number in range(50)]
    steps: list[int] = []
    epochs: list[float] = []

    def note(run: Any, row: Mapping[str, Any]) -> None:
        steps.append(row["step"])

    before = traces()
    for name in ("first", "second"):
        run = mocov3_ds.pretrain(
            "tiny",
            backbone=network,
            data=images,
            name=name,
            deterministic=name == "second",
            on_step=note,
            on_epoch=lambda run, row: epochs.append(row["epoch"]),
            **SETTINGS,
        )
        assert run.is_finished
        after = traces()
        for trace in before:
            assert after[trace] == before[trace], (name, trace, before[trace], after[trace])
    assert random_state == traces()["random"]
    assert all(torch.equal(network.state_dict()[n], t) for n, t in weights.items())
    assert steps == [1, 2, 3, 4, 5, 6] * 2
    assert epochs == [1, 2] * 2
    make_set("shards", [50])
    mocov3_ds.pretrain("tiny", backbone=network, data="shards", name="shards", **SETTINGS)
    assert "6 steps, 2 epochs" in run.report()
    encoder = run.encoder()
    assert isinstance(encoder, Network)
    assert not torch.equal(encoder.mix.weight, network.mix.weight)

    def fail(run: Any, row: Mapping[str, Any]) -> None:
        raise KeyError(row["step"])

    for _ in range(2):  # the folder is free again
        with pytest.raises(KeyError, match="1"):
            mocov3_ds.pretrain("tiny", data="shards", name="fails", on_step=fail, **SETTINGS)
    other = SETTINGS | {"batch": 8}
    with pytest.raises(ValueError, match="holds another run: batch is 16 there, 8 here"):
        mocov3_ds.pretrain("tiny", backbone=network, data=images, name="first", **other)
    assert traces() == before


@pytest.mark.slow
def test_runs_follow_one_another_in_a_process(tmp_path: Path) -> None:
    code = f"from tests.test_pretraining import train_twice; train_twice({str(tmp_path)!r})"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, shards = (rows_of(tmp_path / "runs" / n) for n in ("first", "second", "shards"))
    assert [row["step"] for row in first] == [1, 2, 3, 4, 5, 6]
    assert second == first
    assert shards == first  # the same order and views


def run_python(code: str, folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(launcher or (sys.executable,)), *(("-c", code) if not launcher else (code,))],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_page_on_python_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "mocov3_ds" / "API.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    checks = """
assert len(losses) == 12 and losses[-1] < losses[0], losses
assert accuracy > 60, accuracy
assert isinstance(encoder, Network) and features.shape == (2, 64)
assert [row["step"] for row in again.metrics()] == list(range(12, 19))
"""
    done = run_python(code + checks, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 4: loss" in done.stdout
    assert "finished, 12 steps, 4 epochs" in done.stdout


TWO_RANKS = """
from tests.data.sets import picture
from tests.test_pretraining import Network, SETTINGS
import mocov3_ds, torch

torch.manual_seed(5)
network, images = Network(), [picture(number) for number in range(50)]
for name in ("first", "second"):
    run = mocov3_ds.pretrain("tiny", backbone=network, data=images, name=name, **SETTINGS)
    assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_a_script_under_a_launcher_trains_twice_on_its_ranks(
    tmp_path: Path, free_port: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    port = ("--master-port", str(free_port))
    done = run_python(str(script), tmp_path, "torchrun", "--nproc-per-node", "2", *port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 ranks" in done.stdout + done.stderr
    first, second = (rows_of(tmp_path / "runs" / n) for n in ("first", "second"))
    assert len(first) == 6
    assert second == first


def my_view(image: object, rng: object) -> object:
    """A view function of a user's own."""
    return image


def test_functions_are_named_by_where_they_are_found() -> None:
    assert flags_of({"views": {"function": my_view}}) == [
        "--views.function",
        f"{__name__}:my_view",
    ]
    assert flags_of({"views": {"function": (my_view, my_view)}})[1:] == [f"{__name__}:my_view"] * 2
    with pytest.raises(ValueError, match="is defined inside of another function"):
        flags_of({"views": {"function": lambda image, rng: image}})
