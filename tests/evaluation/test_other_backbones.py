"""Every command on runs whose backbone is a ResNet, a ViT on convolutions or a model of timm."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from mocov3_ds import cli
from mocov3_ds.encoders.load import load_encoder, read_weights
from mocov3_ds.evaluation.finetune import finetune_encoder
from mocov3_ds.evaluation.flags import FinetuneConfig, LinearConfig
from mocov3_ds.evaluation.linear import train_probe
from mocov3_ds.evaluation.results import read_results
from tests.evaluation.runs import make_run, make_splits

RESNET = {"backbone": "timm:resnet14t", "timm": ("layers=[1,1,1,1]", "channels=[8,16,24,32]")}
CONV_STEM = {"backbone": "vit_conv"}
REGISTERS = {
    "backbone": "timm:vit_tiny_patch16_224",
    "timm": ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3", "reg_tokens=2"),
}
MODELS = {
    "resnet50": {"backbone": "resnet50"},
    "resnet14t": RESNET,
    "registers": REGISTERS,
    "swin": {
        "backbone": "timm:swin_tiny_patch4_window7_224",
        "timm": ("patch_size=2", "window_size=2", "embed_dim=12", "depths=[1,1,2,1]",
                 "num_heads=[1,2,2,2]"),
    },
    "convnext": {
        "backbone": "timm:convnext_atto",
        "timm": ("depths=[1,1,1,1]", "dims=[8,16,24,32]"),
    },
    "mixer": {"backbone": "timm:mixer_s32_224"},
    "mobilenet": {"backbone": "timm:mobilenetv3_small_050"},
    "efficientnet": {"backbone": "timm:efficientnet_lite0"},
    "regnet": {"backbone": "timm:regnetx_002"},
    "beit": {
        "backbone": "timm:beit_base_patch16_224",
        "timm": ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3"),
    },
    "dinov2": {
        "backbone": "timm:vit_small_patch14_reg4_dinov2",
        "timm": ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def splits(folder: Path) -> tuple[str, str]:
    return make_splits(folder)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mocov3", *map(str, arguments)])
    assert cli.main() == 0


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, size: int = 16) -> None:
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(theirs.eval()(images), ours(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [RESNET, CONV_STEM, REGISTERS], ids=lambda m: m["backbone"])
def test_commands(
    folder: Path,
    splits: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: dict[str, Any],
) -> None:
    run = make_run(folder / model["backbone"].replace(":", "-"), train=splits[0], val=splits[1],
                   **model)  # fmt: skip
    width = read_weights(run).width
    call(monkeypatch, "knn", run, "--k", 5)
    call(monkeypatch, "look", run, "--images", 2, "--neighbours", 2)
    drawn = {path.name for path in (run / "look-base").iterdir()}
    has_attention = "resnet" not in model["backbone"]
    assert drawn - {"attention.png"} == {"neighbours.png", "similarity.png"}
    assert ("attention.png" in drawn) == has_attention
    assert ("no attention.png" in caplog.text) != has_attention
    if has_attention:
        with Image.open(run / "look-base" / "attention.png") as picture:
            assert np.asarray(picture).std() > 10
    out = folder / f"{run.name}.npz"
    call(monkeypatch, "embed", run, splits[1], "--out", out)
    assert np.load(out)["feature"].shape == (37, width)
    quick = {"epochs": 1, "batch": 16, "micro_batch": 8, "workers": 0}
    for probe in ("linear", "attentive"):
        train_probe(LinearConfig(run=run, probe=probe, learning_rates=(1.0,), **quick))
    recipe = {"auto_augment": "", "mixup": 0, "cutmix": 0, "repeats": 1, "layer_decay": 0.7}
    entry = finetune_encoder(FinetuneConfig(run=run, warmup_epochs=0, **quick, **recipe))
    assert entry["drop_path"] == (0.1 if "conv" in model["backbone"] else 0.0)
    assert {*read_results(run)} == {*("knn base", "linear base", "attentive base", "finetune base")}
    tuned = load_encoder(run / "finetune-base.safetensors")
    assert type(tuned) is type(load_encoder(run))
    assert not torch.equal(next(tuned.parameters()), next(load_encoder(run).parameters()))


@pytest.mark.parametrize(
    "name", ["resnet14t", "registers", *(pytest.param(n, marks=pytest.mark.slow) for n in
             sorted({*MODELS} - {"resnet14t", "registers"}))]
)  # fmt: skip
def test_timm_loads_what_is_exported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    size = 16 if name in ("beit", "dinov2", "registers", "resnet14t") else 32
    run = make_run(folder / f"run-{name}", image_size=size, **MODELS[name])
    out = folder / f"exported-{name}"
    call(monkeypatch, "export", run, "--to", "timm", "--which", "momentum", "--out", out)
    ours = load_encoder(run, "momentum")
    sizes = json.loads((out / "timm.json").read_text())
    tree = json.loads((out / "config.json").read_text())
    assert (tree["architecture"], tree["num_features"]) == (
        MODELS[name]["backbone"].removeprefix("timm:"), read_weights(run).width,
    )  # fmt: skip
    file = str(out / "model.safetensors")
    assert_same(ours, timm.create_model(tree["architecture"], checkpoint_path=file, **sizes), size)
    assert_same(ours, timm.create_model(f"local-dir:{out}", pretrained=True), size)
    for again in (out, out / "model.safetensors"):
        assert_same(ours, load_encoder(again), size)
    assert f'"{tree["architecture"]}", checkpoint_path=' in (out / "README.md").read_text()


def test_a_resnet_in_the_published_layout_loads_in_torchvision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(folder / "r18", backbone="timm:resnet18", projector_layers=2,
                   predictor_norm=False)  # fmt: skip
    out = folder / "r18-published"
    call(monkeypatch, "export", run, "--to", "moco-v3", "--out", out)
    content = torch.load(out / "model.pth.tar", weights_only=True)
    assert content["arch"] == "resnet18"
    tails = {}
    for role in ("base", "momentum"):
        network = torchvision.models.resnet18()
        network.fc = nn.Sequential(
            nn.Linear(512, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 128, bias=False), nn.BatchNorm1d(128, affine=False),
        )  # fmt: skip
        prefix = f"module.{role}_encoder."
        state = {n.removeprefix(prefix): t for n, t in content["state_dict"].items()
                 if n.startswith(prefix)}  # fmt: skip
        network.load_state_dict(state)
        network.fc = nn.Identity()
        assert_same(load_encoder(run, role), network, 32)
        assert_same(load_encoder(out / "model.pth.tar", role), network, 32)
        tails[role] = state["fc.3.weight"]
    assert not torch.equal(*tails.values())
    predictor = {n for n in content["state_dict"] if n.startswith("module.predictor.")}
    assert {n.split(".")[2] for n in predictor} == {"0", "1", "3"}


def test_a_conv_stem_keeps_the_published_names_and_is_refused_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(folder / "conv", **CONV_STEM)
    out = folder / "conv-published"
    call(monkeypatch, "export", run, "--to", "moco-v3", "--out", out)
    content = torch.load(out / "model.pth.tar", weights_only=True)
    names = {n.removeprefix("module.base_encoder.") for n in content["state_dict"]}
    assert {"patch_embed.proj.0.weight", "patch_embed.proj.1.running_var"} <= names
    assert_same(load_encoder(run), load_encoder(out))
    for format_name, rest in (("timm", ""), ("hf", ""), ("deit", "")):
        monkeypatch.setattr(sys, "argv", ["mocov3", "export", str(run), "--to", format_name])
        assert cli.main() == 2
        assert f"--to {format_name} has no place for the backbone" in capsys.readouterr().err + rest
