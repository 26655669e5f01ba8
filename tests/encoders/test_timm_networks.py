"""Encoders that are no plain ViT: what a file says that it is, its tensors, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mocov3_ds.encoders.load import load_encoder, read_weights
from mocov3_ds.encoders.timm_networks import write_arguments
from mocov3_ds.model.shapes import TimmShape

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}


def shake(model: nn.Module) -> Any:
    """The model with weights and running statistics that no other has."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.data += 0.1 * torch.rand_like(buffer)
    return model.eval()


def write_folder(folder: Path, model: nn.Module, name: str, arguments: Any, **more: Any) -> Path:
    folder.mkdir()
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    tree = {"architecture": name, "model_args": arguments, **more}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, size: int) -> None:
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrap", ["module.base_encoder.", "state_dict.", ""])
def test_a_resnet_is_known_by_its_tensors(tmp_path: Path, wrap: str) -> None:
    model = shake(torchvision.models.resnet18(num_classes=7))
    state = {wrap + n: t for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    weights = read_weights(tmp_path / "resnet.pth")
    assert weights.backbone == TimmShape(name="resnet18")
    assert (weights.width, weights.settings.source) == (512, "the tensors of a resnet18")
    assert "fc" in weights.left_out
    model.fc = nn.Identity()
    assert_same(load_encoder(tmp_path / "resnet.pth"), model, 64)
    with pytest.raises(ValueError, match="no momentum encoder; its networks stand below"):
        load_encoder(tmp_path / "resnet.pth", "momentum")
    with pytest.raises(ValueError, match=r"the tensors of a resnet18 decides .* leave out --heads"):
        load_encoder(tmp_path / "resnet.pth", heads=3)


def test_the_published_resnet_layout_has_two_encoders(tmp_path: Path) -> None:
    networks = {role: torchvision.models.resnet18() for role in ("base", "momentum")}
    networks["momentum"] = shake(networks["momentum"])
    state: dict[str, Tensor] = {}
    for role, network in networks.items():
        network.fc = nn.Sequential(nn.Linear(512, 8, bias=False), nn.BatchNorm1d(8))
        state |= {f"module.{role}_encoder.{n}": t for n, t in network.state_dict().items()}
    torch.save({"arch": "resnet18", "state_dict": state, "epoch": 3}, tmp_path / "r18.pth.tar")
    for role in ("base", "momentum"):
        network = networks[role].eval()
        network.fc = nn.Identity()
        assert_same(load_encoder(tmp_path / "r18.pth.tar", role), network, 64)
    del state["module.base_encoder.layer1.0.bn1.running_var"]
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "broken.pth.tar")
    with pytest.raises(ValueError, match=r"lacks 1 tensor: layer1\.0\.bn1\.running_var"):
        load_encoder(tmp_path / "broken.pth.tar")
    state["module.base_encoder.layer1.0.bn1.running_var"] = torch.full((64,), torch.nan)
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "broken.pth.tar")
    with pytest.raises(ValueError, match="numbers that are not finite"):
        load_encoder(tmp_path / "broken.pth.tar")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 36, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 36, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "global_pool": "avg"}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
        ("resnet14t", SMALL),
    ],
)
def test_a_folder_of_timm_says_which_model_it_is(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    if "embed_dim" in arguments:
        arguments = {**arguments, "num_heads": 3}
    model = shake(timm.create_model(name, num_classes=0, **arguments))
    picture = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5], "input_size": [3, 32, 32]}
    folder = write_folder(tmp_path / "model", model, name, arguments, pretrained_cfg=picture)
    with torch.no_grad():
        weights = read_weights(folder)
    assert weights.settings.mean == (0.5, 0.5, 0.5)
    assert f"timm:{name}, {weights.width} features" in weights.describe()
    assert_same(load_encoder(folder), model, weights.image_size)
    if not name.startswith(("resnet", "convnext")):
        shape = weights.backbone
        assert isinstance(shape, TimmShape)
        double = timm.create_model(name, **{**write_arguments(shape), "img_size": 56})
        large = load_encoder(folder, image_size=56)
        assert {n: t.shape for n, t in large.state_dict().items()} == {
            n: t.shape for n, t in double.state_dict().items()
        }


def test_what_a_config_asks_for_beyond_any_network_is_not_made(tmp_path: Path) -> None:
    model = timm.create_model("resnet14t", num_classes=0, **SMALL)
    for number, (arguments, sentence) in enumerate(
        [
            ({**SMALL, "layers": [10**9, 1, 1, 1]}, "asks for a network beyond any"),
            ({**SMALL, "pretrained": True}, "model that cannot be made"),
            ({**SMALL, "drop_rate": 0.5}, "model that cannot be made: .*dropout"),
            ({"layers": [2, 2, 2, 2], "channels": [8, 16, 24, 32]}, "lacks .* tensors: layer1.1"),
        ]
    ):
        folder = write_folder(tmp_path / f"{number}", model, "resnet14t", arguments)
        with pytest.raises(ValueError, match=sentence):
            load_encoder(folder)
