"""Settings beside weights are obeyed, or refused by name: the features are the owner's or none."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mocov3_ds.encoders.load import load_encoder, read_weights
from mocov3_ds.encoders.owner_settings import inspect_timm, read_settings_inside
from mocov3_ds.encoders.torch_file import StandIn
from tests.encoders.test_load import BASE, IMAGES, prefixed

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
NAME = "vit_small_patch16_224"


def shake(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def write_timm(folder: Path, tensors: dict[str, Tensor], tree: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def test_a_folder_of_timm(tmp_path: Path) -> None:
    for options in ({}, {"num_heads": 2}, {"qkv_bias": False}):
        arguments = {**SIZES, **options}
        model = shake(timm.create_model(NAME, num_classes=0, **arguments))
        tree = {"architecture": NAME, "model_args": arguments,
                "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}}  # fmt: skip
        folder = write_timm(tmp_path / "timm", dict(model.state_dict()), tree)
        with torch.no_grad():
            for path in (folder, folder / "model.safetensors"):
                ours = load_encoder(path)(IMAGES)
                torch.testing.assert_close(ours, model(IMAGES), atol=1e-5, rtol=1e-5)
        settings = read_weights(folder).settings
        assert (settings.mean, settings.std) == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    with pytest.raises(ValueError, match=r"config\.json \(vit_.*\) says 4, --heads says 8"):
        load_encoder(folder, heads=8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"architecture": "vit_base_patch16_rpn_224"}, "no place for 5 tensors: blocks.0.attn.qkv"),
     ({"architecture": "hf-hub:someone/else"}, "timm does not know"),
     ({"architecture": "resnet50"}, "timm:resnet50 knows no keyword 'depth'"),
     ({"architecture": 3}, "timm does not know"),
     ({"global_pool": "avg"}, "no place for 2 tensors: norm.bias, norm.weight"),
     ({"model_args": {"act_layer": "relu"}}, "are not those of timm:vit_small"),
     ({"model_args": {"checkpoint_path": "x"}}, "model that cannot be made: .*checkpoint_path"),
     ({"model_args": {"embed_dim": 384}}, "says dim 384, the weights 32"),
     ({"model_args": {**SIZES, "depth": 10**9}}, "says depth 1000000000, the weights 2"),
     ({"model_args": {**SIZES, "pre_norm": True}}, "no place for 1 tensor: patch_embed"),
     ({"model_args": [[1]]}, "which is no object"),
     ({"pretrained_cfg": 3}, "which is no object"),
     ({"pretrained_cfg": {"std": [0, 1, 1]}}, "a number for each channel")],
)  # fmt: skip
def test_what_timm_would_compute_otherwise(tmp_path: Path, change: Any, sentence: str) -> None:
    tree = {"architecture": NAME, "model_args": SIZES, **change}
    folder = write_timm(tmp_path / "timm", dict(BASE.state_dict()), tree)
    with pytest.raises(ValueError, match=sentence):
        load_encoder(folder)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    import transformers

    def save(**options: Any) -> Any:
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            image_size=16, patch_size=4, **options)  # fmt: skip
        model = shake(transformers.ViTModel(config))
        model.save_pretrained(tmp_path)
        return model

    for options in ({}, {"layer_norm_eps": 0.5}, {"qkv_bias": False}):
        model = save(**options)
        with torch.no_grad():
            theirs = model(IMAGES).last_hidden_state[:, 0]
            ours = load_encoder(tmp_path)(IMAGES)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert read_weights(tmp_path).settings.mean == (0.5, 0.5, 0.5)
    assert "normalised by mean (0.5, 0.5, 0.5)" in read_weights(tmp_path).describe()
    assert "left out: pooler (2)" in read_weights(tmp_path).describe()
    for options, sentence in (
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"model_type": "beit"}, "model_type 'beit', whose forward pass is another one"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps '1e-6'"),
        ({"qkv_bias": "no"}, "qkv_bias 'no'"),
        ({"num_hidden_layers": 12}, "says depth 12, the weights 2"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, which is no number"),
        ({"num_attention_heads": "four"}, "num_attention_heads 'four'"),
    ):
        save()
        tree = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(tree | options))
        with pytest.raises(ValueError, match=sentence):
            load_encoder(tmp_path)


def test_options_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def heads(prefix: str, **tree: Any) -> int:
        return read_settings_inside(tree, prefix).heads

    options = StandIn()
    options.__setstate__({"arch": "vit_small"})
    assert heads("teacher.backbone.", args=options) == 6
    assert heads("state_dict.module.base_encoder.", arch="vit_small") == 12
    assert heads("state_dict.", arch="vit_small_patch16_224.augreg") == 6
    assert heads("model.", args={"model": "deit_tiny_patch16_224"}) == 3
    assert heads("", num_heads=4, arch="deit_tiny_patch16_224") == 4
    assert heads("", num_heads=-1, arch="unknown") == heads("", num_heads=True) == 0
    assert read_settings_inside({"arch": "vit_small"}, "a.base_encoder.", 4).heads == 4
    with pytest.raises(ValueError, match="the file says vit_base_patch16_rpn_224"):
        heads("state_dict.", arch="vit_base_patch16_rpn_224")
    saved = {"teacher": prefixed("backbone.", BASE), "args": argparse.Namespace(arch="vit_tiny")}
    torch.save(saved, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match="32 must be a multiple of the 3 heads"):
        load_encoder(tmp_path / "dino.pth", "momentum")
    torch.save({"model": BASE.state_dict(), "args": {"model": "vit_base_patch16_224"}},
               tmp_path / "other.pth")  # fmt: skip
    with pytest.raises(ValueError, match="says dim 768, the weights 32; they do not belong"):
        load_encoder(tmp_path / "other.pth")


def test_the_plain_ones_of_timm() -> None:
    assert inspect_timm("vit_base_patch16_224.mae", {}, "x").heads == 12
    assert not inspect_timm("vit_base_patch16_224_miil", {}, "x").qkv_bias
    for name in ("vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_quickgelu_224",
                 "deit3_small_patch16_224", "vit_base_patch16_xp_224"):  # fmt: skip
        with pytest.raises(ValueError, match="which the plain ViT here has not"):
            inspect_timm(name, {}, "x")
