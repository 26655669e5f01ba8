"""What is exported loads where it is meant to and gives the same features."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.config.run_config import encoder_shape
from mocov3_ds.data.storage.tensor_file import save_tensors
from mocov3_ds.encoders.choices import EncoderRole, Format
from mocov3_ds.encoders.export import WRITERS, Forward, export_encoder
from mocov3_ds.encoders.foreign_names import timm_sizes, to_timm, to_transformers
from mocov3_ds.encoders.load import load_encoder, read_run_config, read_weights
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape, build_vit, sincos_positions
from tests.encoders.test_load import plain_features
from tests.evaluation.runs import DIM, HEADS, SIZE, make_run

FORMATS: list[Format] = ["timm", "deit", "hf", "moco-v3"]


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def features_there(out: Path, to: Format, shape: VitShape, x: Tensor) -> Tensor:
    """Load the exported folder as a user of the other program does."""
    if to == "timm":
        model = timm.create_model(
            "vit_base_patch16_224",
            checkpoint_path=str(out / "model.safetensors"),
            **json.loads((out / "timm.json").read_text()),
        )
        return model.eval()(x)
    if to == "deit":
        model = timm.create_model("deit_base_patch16_224", **timm_sizes(shape))
        model.load_state_dict(torch.load(out / "model.pth", weights_only=True)["model"])
        return model.eval()(x)
    if to == "hf":
        import transformers

        model = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False).eval()
        return model(pixel_values=x).last_hidden_state[:, 0]
    state = torch.load(out / "model.pth.tar", weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    own = {n: t for n, t in own.items() if not n.startswith("head.")}
    return plain_features(own, shape.heads, x)


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_goes_everywhere(tmp_path: Path, to: Format) -> None:
    run = make_run(tmp_path / "run")
    for which in ("base", "momentum"):
        out = tmp_path / which
        difference = export_encoder(run, out, to=to, role=which)  # type: ignore[arg-type]
        assert difference < 1e-5
        encoder = load_encoder(run, which)  # type: ignore[arg-type]
        there = features_there(out, to, read_weights(run).shape, images(SIZE))
        torch.testing.assert_close(there, encoder(images(SIZE)), atol=1e-5, rtol=1e-5)
        again = load_encoder(out)  # and comes back, with its number of heads
        torch.testing.assert_close(again(images(SIZE)), there, atol=1e-5, rtol=1e-5)
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize("to", FORMATS)
def test_another_size_and_no_positions(tmp_path: Path, to: Format) -> None:
    run = make_run(tmp_path / "run")
    export_encoder(run, tmp_path / "large", to=to, image_size=24)
    larger = load_encoder(run, image_size=24)
    assert torch.equal(larger.pos_embed, sincos_positions((6, 6), DIM))
    shape = VitShape(image_size=24, patch_size=4, dim=DIM, depth=2, heads=HEADS)
    there = features_there(tmp_path / "large", to, shape, images(24))
    torch.testing.assert_close(there, larger(images(24)), atol=1e-5, rtol=1e-5)
    blind = make_run(tmp_path / "blind", positions="none")
    export_encoder(blind, tmp_path / "out", to=to)
    there = features_there(tmp_path / "out", to, read_weights(blind).shape, images(SIZE))
    torch.testing.assert_close(there, load_encoder(blind)(images(SIZE)), atol=1e-5, rtol=1e-5)


def parity(name: str, tmp_path: Path) -> None:
    """Random weights of a paper size, one image, through each of the programs."""
    shape = PAPER_SHAPES[name]
    torch.manual_seed(0)
    vit = build_vit(shape).eval()
    torch.save({"state_dict": {f"module.base_encoder.{n}": t for n, t in vit.state_dict().items()}},
               tmp_path / "x.pth.tar")  # fmt: skip
    x = images(224, 1)
    with torch.no_grad():
        ours = vit(x)
    del vit
    # at this size each forward pass takes seconds; DeiT's layout is timm's
    for to in FORMATS if shape.dim < 1280 else ("timm", "hf", "moco-v3"):
        out = tmp_path / to
        export_encoder(tmp_path / "x.pth.tar", out, to=to)  # heads from the width
        there = features_there(out, to, shape, x)
        torch.testing.assert_close(there, ours, atol=1e-5, rtol=1e-5)
        if to == "timm":
            named = timm.create_model(
                {"vit_s16": "vit_small_patch16_224", "vit_b16": "vit_base_patch16_224",
                 "vit_l16": "vit_large_patch16_224", "vit_h14": "vit_huge_patch14_224"}[name],
                checkpoint_path=str(out / "model.safetensors"),
                num_classes=0, num_heads=shape.heads, dynamic_img_size=True,
            ).eval()  # fmt: skip
            with torch.no_grad():
                torch.testing.assert_close(named(x), ours, atol=1e-5, rtol=1e-5)
                assert named(images(18 * shape.patch_size, 1)).shape == ours.shape
            del named
        for file in out.iterdir():
            file.unlink()
    (tmp_path / "x.pth.tar").unlink()


def test_parity_of_vit_s(tmp_path: Path) -> None:
    parity("vit_s16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b16", "vit_l16", "vit_h14"])
def test_parity_of_the_large_ones(tmp_path: Path, name: str) -> None:
    parity(name, tmp_path)


def test_the_published_layout_holds_the_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    export_encoder(run, tmp_path / "a", to="moco-v3")
    file = torch.load(tmp_path / "a/model.pth.tar", weights_only=True)
    state, saved = file["state_dict"], read_weights(run).saved
    assert saved is not None
    assert torch.equal(
        state["module.predictor.3.weight"], saved.read_tensor("base", "predictor.3.weight")
    )
    for encoder, group in (("base_encoder", "base"), ("momentum_encoder", "momentum")):
        assert torch.equal(
            state[f"module.{encoder}.head.7.running_var"],
            saved.read_tensor(group, "projector.7.running_var"),
        )
        backbone = to_timm(state, group)  # type: ignore[arg-type]
        assert torch.equal(backbone["norm.bias"], saved.read_tensor(group, "backbone.norm.bias"))
    export_encoder(run, tmp_path / "b", to="moco-v3", role="momentum")
    alone = torch.load(tmp_path / "b/model.pth.tar", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in alone} == {"base_encoder"}


def test_features_that_differ_are_no_success(tmp_path: Path) -> None:
    def write_wrong(weights: Weights, tensors: dict[str, Tensor], out: Path) -> Forward:
        return WRITERS["deit"](weights, tensors | {"norm.bias": tensors["norm.bias"] + 1e-3}, out)

    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"features differ by 0\.001 .* nothing was written"):
        export_encoder(run, out, to="deit", writers={"deit": write_wrong})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_encoder(run, tmp_path / "out")  # empty: fine
    before = (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="is not empty; give another --out"):
        export_encoder(run, tmp_path / "out", to="hf")
    assert (tmp_path / "out/README.md").read_text() == before


def test_what_an_export_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run")

    def export(to: Format, role: EncoderRole) -> str:
        caplog.clear()
        out = tmp_path / f"{to}-{role}"
        export_encoder(run, out, to=to, role=role)
        card = (out / "README.md").read_text()
        said = caplog.text.partition("left out: ")[2].strip()
        assert f"Not in this folder: {said or 'nothing that was there'}." in card
        return said

    assert "momentum (46), base.projector (16), base.predictor (10); --to moco" in export(
        "timm", "base"
    )
    assert "base (56), momentum.projector (16); --to moco-v3 keeps" in export("deit", "momentum")
    assert export("moco-v3", "base") == ""
    assert export("moco-v3", "momentum") == "the base encoder and its predictor"


def test_an_epsilon_has_a_place_in_transformers_alone(tmp_path: Path) -> None:
    model = build_vit(VitShape(image_size=16, patch_size=4, dim=32, depth=1, heads=4))
    folder = tmp_path / "owner"
    folder.mkdir()
    save_tensors(to_transformers(model.state_dict()), folder / "model.safetensors")
    settings = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 0.1}
    (folder / "config.json").write_text(json.dumps(settings))
    assert export_encoder(folder, tmp_path / "hf", to="hf") < 1e-5
    with pytest.raises(ValueError, match=r"epsilon 0\.1, for which only --to hf has a place"):
        export_encoder(folder, tmp_path / "timm", to="timm")


@pytest.mark.parametrize(
    ("flag", "value"), [("qk_norm", True), ("layer_scale", 0.1), ("sigma_reparam", True)]
)
def test_variants_of_the_vit(tmp_path: Path, flag: str, value: object) -> None:
    """As trained, exported to timm, and read again; other programs have no place, or no need."""
    run = make_run(tmp_path / "run", **{flag: value})
    weights = read_weights(run)
    trained = BaseEncoder(encoder_shape(read_run_config(run)))
    saved = checkpoint.find_newest(run)
    assert saved is not None
    trained.load_state_dict(dict(saved.read_group("base")))
    theirs = trained.backbone.eval()(images(SIZE)).detach()
    torch.testing.assert_close(load_encoder(run)(images(SIZE)), theirs, atol=1e-5, rtol=1e-5)
    export_encoder(run, tmp_path / "timm", to="timm")
    there = features_there(tmp_path / "timm", "timm", weights.shape, images(SIZE))
    torch.testing.assert_close(there, theirs, atol=1e-5, rtol=1e-5)
    again = load_encoder(tmp_path / "timm")
    torch.testing.assert_close(again(images(SIZE)), theirs, atol=1e-5, rtol=1e-5)
    for to in ("deit", "hf", "moco-v3"):
        if flag == "sigma_reparam":  # nothing but ordinary weights is left of it
            export_encoder(run, tmp_path / to, to=to)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match=f"--model.{flag}: .* --to {to} has no place"):
                export_encoder(run, tmp_path / to, to=to)  # type: ignore[arg-type]
